"""Corruptions, which are applied to a clean image once, and the noise levels of images that are already noisy.

It imports ambient_core and data_pipeline.format.
"""
