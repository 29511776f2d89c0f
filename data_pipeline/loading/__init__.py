"""Reads batches from shards: the order of the samples, the reader, the cache, the worker processes, the stream.

Imports ambient_core and data_pipeline's format and latents; trainer imports it.
"""
