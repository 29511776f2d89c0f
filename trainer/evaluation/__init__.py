"""Is it clean? Clean images are used here, and nowhere else."""
