"""The code that runs inside a job, and decides whether the job is started again.

Imports ambient_core and the command `trainer.train`.
"""
