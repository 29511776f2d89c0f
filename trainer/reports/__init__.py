"""Evaluations of runs and studies of many runs: carries them out, records them, writes pages and tables.

Imports trainer's evaluation, inference and tracking; the commands import it.
"""
