"""Checkpoints: written atomically, found, verified, kept, and loaded with any number of ranks.

This package imports trainer's engine and monitor; config, inference, planning and training import it.
"""
