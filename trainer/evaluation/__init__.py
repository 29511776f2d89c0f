"""Measures: distances between sets of images, the denoiser's error, memorization.

Clean images are used here, to judge, and never in training but for what `logging.reference` shows of it.
Imports trainer.diffusion and data_pipeline; reports and training's previews import it.
"""
