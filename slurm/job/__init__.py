"""What runs inside a job, and decides whether it is started again.

Imports ambient_core and the command `trainer.train`.
"""
