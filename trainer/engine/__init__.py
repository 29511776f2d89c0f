"""DeepSpeed, ranks, precision and the averages of weights.

Alone imports deepspeed. Imports ambient_core and data_pipeline.loading; checkpoint, models, planning and training
import it.
"""
