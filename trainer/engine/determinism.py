"""Deterministic training: the same bits from the same configuration, also on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ambient_core.errors import UserError


@contextmanager
def forced(wanted: bool) -> Iterator[None]:
    """A context in which torch uses algorithms that give the same bits each time, if `wanted`. Raises UserError if an
    operation has no such algorithm."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise UserError(
            f"engine.deterministic: {str(error).partition('. ')[0]}: set it to false, or avoid this operation",
            field="engine.deterministic",
            code="unsupported",
        ) from None
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
