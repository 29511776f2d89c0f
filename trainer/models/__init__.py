"""Backbones from diffusers, behind the interface that the denoiser calls."""
