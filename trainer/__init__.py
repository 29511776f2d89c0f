"""Trains diffusion models from corrupted images alone (arXiv 2404.10177)."""

__version__ = "0.1.0"
