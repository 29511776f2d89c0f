"""Launches on SLURM, and on this machine by the same code, through submitit."""
