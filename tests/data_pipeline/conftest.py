"""Captioned pictures, and an independent reader of shards."""

from __future__ import annotations

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.format.index import read_index

CAPTIONS = ["a disc", "another disc", "a disc, again"]
COUNT = 14


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 colour pictures of 40x32 pixels, three captions between them; a 15th cannot be read, and a 16th has 16
    bits."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for i, pixels in enumerate(generator.integers(0, 256, (COUNT, 32, 40, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"p{i:02d}.png")
        (folder / f"p{i:02d}.txt").write_text(CAPTIONS[i % 3])
    (folder / "p05a.png").write_bytes(b"not a picture")
    Image.fromarray(np.full((32, 40), 999, np.uint16)).save(folder / "p05b.png")
    return folder


def samples(folder: Path) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """By key, in the shards' order: the observation, and what is recorded beside it; by tarfile and numpy alone."""
    members: dict[str, bytes] = {}
    for entry in read_index(folder).shards:
        with tarfile.open(folder / entry.name) as tar:
            members |= {m.name: file.read() for m in tar if (file := tar.extractfile(m))}
    keys = [name.removesuffix(".json") for name in members if name.endswith(".json")]
    return {key: (np.load(BytesIO(members[f"{key}.x_n.npy"])), json.loads(members[f"{key}.json"])) for key in keys}
