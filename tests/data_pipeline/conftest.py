"""A tiny pipeline of Stable Diffusion XL's classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.models.tiny_sdxl import write_tiny_sdxl


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    write_tiny_sdxl(folder)
    return folder
