"""Trained models in use: loaded from runs, checkpoints and exports, sampled, drawn, described.

Imports trainer's checkpoint, config, engine and models; evaluation's reports and training's previews import it.
"""
