"""Turns images into shards of noisy observations, and shards into batches in an exact, resumable order.

This folder holds the commands. It imports ambient_core and its own subfolders; trainer and slurm import it.
"""
