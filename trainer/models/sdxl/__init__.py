"""Stable Diffusion XL: its UNet on a base pipeline's latents, with captions or a prompt. `adapter` is what others ask.

Imports ambient_core, data_pipeline, trainer's diffusion and what lies beside this folder in trainer.models; the run
configuration imports it.
"""
