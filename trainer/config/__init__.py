"""A run's configuration: from YAML and overrides to frozen dataclasses and back, and what is said of wrong values.

Alone imports pydantic. Imports the folders whose dataclasses it puts together; planning, training and the commands
import it.
"""
