"""MLflow: what is logged, how it is sent, and where it is kept while the server cannot be reached.

Only this folder imports mlflow. It imports ambient_core; config, reports and training import it.
"""
