"""From images to latents of a Stable Diffusion XL VAE, with what its training needs of each image and caption."""
