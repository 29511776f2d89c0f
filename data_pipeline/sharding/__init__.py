"""Makes a complete folder of shards from a source: plans it, writes it in parallel, resumes and checks it.

Imports ambient_core and data_pipeline's format, inputs, corruption and latents.
"""
