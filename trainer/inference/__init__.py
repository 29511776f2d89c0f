"""The use of trained models: loads runs, checkpoints and exports, draws images, and writes model cards.

Imports trainer's checkpoint, config, engine and models; evaluation's reports and training's previews import it.
"""
