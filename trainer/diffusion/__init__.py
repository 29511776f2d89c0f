"""The mathematics of training and sampling. It depends on torch only: no files, ranks or configuration framework.

This package imports ambient_core's batch and seeding; every other folder of trainer may import it.

Everything is written in variance-exploding (VE) coordinates, `x_t = x0 + sigma_t z`.
Notation in every file: `x0` a clean sample, `x_n` the observation at level `sigma_n`, `x_t` and `x_s`
points at levels `sigma_t > sigma_s`, `h` the denoiser's estimate of E[x0 | x_t].
Shape suffixes: B batch, R rows of a particle pool, K particles per row. Images are (B, C, H, W), but every loss
accepts any (B, *D).
"""
