"""The loop, one step of it, and what is put together for a run.

Imports every other folder of trainer but reports; the command `trainer.train` imports it.
"""
