"""DeepSpeed, ranks, precision and the averages of the weights.

Only this package imports deepspeed. It imports ambient_core and data_pipeline.loading; checkpoint, models, planning and
training import it.
"""
