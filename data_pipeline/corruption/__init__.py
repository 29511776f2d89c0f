"""What is done to a clean image once, and what is known of an image that was noisy before.

Imports ambient_core and data_pipeline.format.
"""
