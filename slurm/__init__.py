"""Launches on SLURM through submitit. Nothing else imports this package."""
