"""Launches on SLURM, and on this machine by the same code, through submitit.

Alone imports submitit. Imports every package; no package imports it.
"""
