"""The kinds of sources, one file each; `sources.py` chooses among them.

Imports ambient_core and data_pipeline.format.
"""
