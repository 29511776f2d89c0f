"""A run's configuration: makes frozen dataclasses from YAML and overrides, writes them back, and explains wrong values.

Only this folder imports pydantic. It imports the folders whose dataclasses it combines; planning, training and the
commands import it.
"""
