"""From a source to a complete folder of shards: planned, written in parallel, resumed, checked.

Imports ambient_core and data_pipeline's format, inputs, corruption and latents.
"""
