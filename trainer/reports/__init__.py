"""Evaluations of runs, and studies of many: carried out, recorded, written as pages and tables.

Imports trainer's evaluation, inference and tracking; the commands import it.
"""
