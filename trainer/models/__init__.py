"""Backbones, one file a kind: its configuration, its network, and the adapter that the rest of the project asks.

Imports ambient_core, data_pipeline and trainer's diffusion and engine; config, planning, inference and training import
it.
"""

from __future__ import annotations

import logging


def quieten_xformers() -> None:
    """Before diffusers is imported: without a GPU xformers has no operator, and says so at length."""
    import torch  # here, since it takes seconds

    if not torch.cuda.is_available():
        logging.getLogger("xformers").setLevel(logging.ERROR)
