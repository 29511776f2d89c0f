"""Measures: distances between sets of images, the denoiser's error, memorization.

Clean images are used here for evaluation, never for training. During training only `logging.reference` reads them, to
log how samples compare with them.
Imports trainer.diffusion and data_pipeline; reports and training's previews import it.
"""
