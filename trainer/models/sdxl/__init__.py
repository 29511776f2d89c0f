"""Stable Diffusion XL: its UNet on a base pipeline's latents, with captions or a prompt. Other folders use `adapter`.

Imports ambient_core, data_pipeline, trainer's diffusion and the other files of trainer.models; the run
configuration imports it.
"""
