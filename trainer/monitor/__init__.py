"""What is watched while training goes: metrics by level, slow ranks, spikes, collapse.

Imports trainer's diffusion and engine; checkpoint and training import it.
"""
