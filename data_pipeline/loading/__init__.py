"""From shards to batches: the order, the reader, the cache, the worker processes, the stream.

Imports ambient_core and data_pipeline's format and latents; trainer imports it.
"""
