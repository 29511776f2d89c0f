"""Measurements: each file prints one table. README.md explains the rows."""
