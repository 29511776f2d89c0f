"""The kinds of sources, one file each; `sources.py` chooses among them.

It imports ambient_core and data_pipeline.format.
"""
