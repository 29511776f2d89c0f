"""From images to shards of noisy observations, and from shards to batches in an exact, resumable order."""
