"""Checkpoints: written atomically, found, verified, kept, and loaded with any number of ranks.

This package imports trainer's engine and monitor; inference and training import it.
"""
