"""Checkpoints: written atomically, found, verified, kept, loaded on any number of ranks.

Imports trainer's engine and monitor; inference and training import it.
"""
