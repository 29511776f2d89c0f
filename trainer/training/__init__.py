"""The training loop, one step of it, and the assembly of a run.

This package imports every other folder of trainer except reports; the command `trainer.train` imports it.
"""
