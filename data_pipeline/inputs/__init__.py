"""The kinds of sources, one file each. `data_pipeline.sources` is the front."""
