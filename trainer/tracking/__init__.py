"""MLflow: what is logged, by whom, and where it is kept while the server is away.

Alone imports mlflow. Imports ambient_core; config, reports and training import it.
"""
