"""What a library says that nobody asked."""

from __future__ import annotations

import logging


def quieten_xformers() -> None:
    """Before diffusers is imported: without a GPU xformers has no operator, and says so at length."""
    import torch  # here, since it takes seconds

    if not torch.cuda.is_available():
        logging.getLogger("xformers").setLevel(logging.ERROR)
