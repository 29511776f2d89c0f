"""Launches jobs through submitit: on SLURM, and by the same code on this machine.

This package imports every other package, and no other package imports it. Only it imports submitit.
"""
