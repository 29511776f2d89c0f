"""Trains diffusion models from corrupted images alone (arXiv 2404.10177).

This folder holds the commands, which contain little code of their own. It imports ambient_core, data_pipeline and the
folders below; slurm imports it.
"""

import logging

__version__ = "0.1.0"

# If bitsandbytes is installed, peft and diffusers import it for every model, and on CPUs it logs long warnings about
# 4-bit kernels.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
