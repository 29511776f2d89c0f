"""Encodes images as latents of a Stable Diffusion XL VAE, and captions as tokens and text embeddings.

Imports ambient_core and data_pipeline's format, inputs and corruption.
"""
