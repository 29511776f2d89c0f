"""Measurements: each file prints one table. README.md says what each row means."""
