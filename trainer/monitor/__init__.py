"""Monitors of a training: metrics by noise level, slow ranks, spikes, collapse.

This package imports trainer's diffusion and engine; checkpoint and training import it.
"""
