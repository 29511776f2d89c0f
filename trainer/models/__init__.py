"""Backbones, one file per kind: its configuration, its network, and the adapter that other folders use.

Imports ambient_core, data_pipeline and trainer's diffusion and engine; config, planning, inference and training import
it.
"""

from __future__ import annotations

import logging


def quieten_xformers() -> None:
    """Silences xformers, to be called before diffusers is imported. Without a GPU, xformers has no operator, and logs
    long warnings about it."""
    import torch  # imported here since it takes seconds

    if not torch.cuda.is_available():
        logging.getLogger("xformers").setLevel(logging.ERROR)
