"""Trains diffusion models from corrupted images alone (arXiv 2404.10177).

Here: the commands, each thin. Imports ambient_core, data_pipeline and the folders below; slurm imports it.
"""

import logging

__version__ = "0.1.0"

# Where it is installed, peft and diffusers import it for all models, and on CPUs it asks at length for 4-bit kernels.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
