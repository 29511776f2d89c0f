"""Writes the same samples as shards, for webdataset and our reader, and as MDS files, for mosaicml-streaming."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from webdataset.writer import TarWriter

from data_pipeline.format.index import Shard, ShardIndex, read_index, write_index

SIGMA_N = 0.2
DISTINCT = 64
"""Number of different samples. The files repeat them, which gives no reader an advantage."""


@dataclass(frozen=True)
class Kind:
    """A kind of sample. per_shard: samples per shard. jpeg: the peers store JPEG, and decode it as their users do."""

    name: str
    shape: tuple[int, int, int]
    samples: int
    quick_samples: int
    per_shard: int
    batch: int
    jpeg: bool = False


KINDS = (
    Kind("images", (3, 32, 32), 100_000, 12_000, 1000, 64),
    Kind("latents", (4, 128, 128), 5000, 5000, 250, 32),
    Kind("jpeg", (3, 512, 512), 2000, 320, 40, 16, jpeg=True),
)


@dataclass(frozen=True)
class Files:
    """The folders of one kind. shards: tar files of float16 observations, with our index. peers: for kinds without JPEG
    the same folder, else tar files with JPEG. mds: files for mosaicml-streaming."""

    kind: Kind
    samples: int
    shards: Path
    peers: Path
    mds: Path

    def tars(self, folder: Path) -> list[str]:
        return sorted(str(path) for path in folder.glob("*.tar"))


def make(folder: Path, kind: Kind, samples: int, streaming: Any) -> Files:
    """Writes the files of one kind. streaming: the package `streaming.base`."""
    files = Files(kind, samples, folder / "shards", folder / ("jpeg" if kind.jpeg else "shards"), folder / "mds")
    clean, observed = _samples(kind)
    npy = [npy_bytes(x) for x in observed]
    write_shards(files.shards, kind, samples, ({"x_n.npy": npy[i % DISTINCT]} for i in range(samples)))
    encoded = [jpeg_bytes(image) for image in clean] if kind.jpeg else []
    if kind.jpeg:
        write_shards(files.peers, kind, samples, ({"jpg": encoded[i % DISTINCT]} for i in range(samples)))
    columns = {"x": "bytes" if kind.jpeg else f"ndarray:float16:{','.join(map(str, kind.shape))}"}
    with streaming.MDSWriter(out=str(files.mds), columns={**columns, "sigma_n": "float64", "key": "str"}) as writer:
        for i in range(samples):
            x = encoded[i % DISTINCT] if kind.jpeg else observed[i % DISTINCT]
            writer.write({"x": x, "sigma_n": SIGMA_N, "key": f"{i:08d}"})
    return files


def many_shards(folder: Path, count: int, real: int = 10, per_shard: int = 500) -> Files:
    """Makes a folder of `count` shards of small images. `real` of them are files, the others hard links to these."""
    kind = Kind(f"{count} shards", (3, 32, 32), count * per_shard, count * per_shard, per_shard, 50)
    observed = _samples(kind)[1]
    npy = [npy_bytes(x) for x in observed]
    write_shards(folder, kind, real * per_shard, ({"x_n.npy": npy[i % DISTINCT]} for i in range(real * per_shard)))
    shards = list(read_index(folder).shards)
    for i in range(real, count):
        like = shards[i % real]
        shards.append(Shard(f"shard-{i:06d}.tar", like.samples, like.bytes, like.sha256))
        (folder / shards[-1].name).hardlink_to(folder / like.name)
    write_index(str(folder), ShardIndex(tuple(shards), (kind.shape,), SIGMA_N, SIGMA_N, {}))
    return Files(kind, kind.samples, folder, folder, folder)


def pictures(folder: Path, count: int, distinct: int = 4) -> None:
    """Makes JPEG files of 4000 x 3000 pixels, as a camera writes them. distinct: number of real files; the others are
    hard links to these."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i:06d}.jpg"
        if i < distinct:
            path.write_bytes(jpeg_bytes(_picture(generator, 3000, 4000)))
        else:
            path.hardlink_to(folder / f"{i % distinct:06d}.jpg")


def write_shards(folder: Path, kind: Kind, samples: int, members: Iterator[dict[str, bytes]]) -> None:
    folder.mkdir(parents=True)
    shards: list[Shard] = []
    meta = json.dumps({"sigma_n": SIGMA_N}).encode()
    for first in range(0, samples, kind.per_shard):
        buffer, count = BytesIO(), min(kind.per_shard, samples - first)
        with TarWriter(buffer, encoder=False, mtime=0) as tar:  # pyright: ignore[reportArgumentType]
            for i in range(first, first + count):
                tar.write({"__key__": f"{i:08d}", **next(members), "json": meta})
        name = f"shard-{len(shards):06d}.tar"
        (folder / name).write_bytes(buffer.getbuffer())
        digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
        shards.append(Shard(name, count, buffer.getbuffer().nbytes, digest))
    write_index(str(folder), ShardIndex(tuple(shards), (kind.shape,), SIGMA_N, SIGMA_N, {}))


def _samples(kind: Kind) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.float16]]]:
    """Returns clean pictures (H, W, 3) and their noisy observations. The pictures are smooth with some grain, so their
    JPEGs are about as large as those of photos. Latents are only noise, and have no clean pictures."""
    generator = np.random.default_rng(0)
    channels, height, width = kind.shape
    if channels != 3:
        return [], [generator.standard_normal(kind.shape).astype(np.float16) for _ in range(DISTINCT)]
    clean = [_picture(generator, height, width) for _ in range(DISTINCT)]
    scaled = [image.transpose(2, 0, 1) / np.float32(127.5) - 1 for image in clean]
    noise = (SIGMA_N * generator.standard_normal((DISTINCT, *kind.shape), dtype=np.float32)).astype(np.float32)
    return clean, [(x0 + z).astype(np.float16) for x0, z in zip(scaled, noise, strict=True)]


def _picture(generator: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    small = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    large = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    grain = generator.normal(0, 4, (height, width, 1))
    return (0.6 * large + 50 + grain).clip(0, 255).astype(np.uint8)


def npy_bytes(x: NDArray[Any]) -> bytes:
    buffer = BytesIO()
    np.save(buffer, x, allow_pickle=False)
    return buffer.getvalue()


def jpeg_bytes(image: NDArray[np.uint8]) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
