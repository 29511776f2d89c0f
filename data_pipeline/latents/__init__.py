"""From images to latents of a Stable Diffusion XL VAE, with what its training needs of each image and caption.

Imports ambient_core and data_pipeline's format, inputs and corruption.
"""
