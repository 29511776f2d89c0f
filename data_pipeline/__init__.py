"""From images to shards of noisy observations, and from shards to batches in an exact, resumable order.

Here: the commands. Imports ambient_core and the folders below; trainer and slurm import it.
"""
