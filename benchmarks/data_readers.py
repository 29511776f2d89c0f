"""The readers that are compared. Each is a function from files to float32 batches in the training process.

Each reader has one background process, shuffles shards and samples, and returns batches of the same size. All send
float16 or uint8 between the processes, which is cheaper, and convert to float32 in the training process.
"""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from ambient_core import paths
from benchmarks.data_files import Files
from data_pipeline.loading.config import DataConfig, Layout
from data_pipeline.loading.loader import Loader

REQUIREMENTS = Path(__file__).parent / "data_peers.txt"

Reader = Callable[[Files, int], Iterator[Tensor]]
"""files, first sample -> float32 batches (B, C, H, W)."""


def ours(files: Files, start: int, group: int = 16) -> Iterator[Tensor]:
    layout = Layout(files.kind.batch, files.kind.batch, 0, 1)
    loader = Loader(DataConfig(str(files.shards), group=group), layout, 0, torch.device("cpu"))
    return (batch.x_n for batch in loader.stream(start - start % files.kind.batch))


def ours_in_small_groups(files: Files, start: int) -> Iterator[Tensor]:
    return ours(files, start, group=4)


def webdataset(files: Files, start: int) -> Iterator[Tensor]:
    """webdataset's reader. It cannot resume: samples before `start` are read, and dropped before they are decoded."""
    return _webdataset(files, start, files.peers, files.kind.jpeg)


def webdataset_of_npy(files: Files, start: int) -> Iterator[Tensor]:
    return _webdataset(files, start, files.shards, False)


def _webdataset(files: Files, start: int, folder: Path, jpeg: bool) -> Iterator[Tensor]:
    from webdataset.compat import WebDataset, WebLoader

    tars = files.tars(folder)
    dataset: Any = WebDataset(tars, shardshuffle=len(tars), empty_check=False, seed=0)
    if start:
        dataset = dataset.slice(start, sys.maxsize)
    dataset = dataset.shuffle(1000 if files.kind.samples > 10_000 else 100)
    dataset = dataset.decode("rgb8") if jpeg else dataset.decode()
    dataset = dataset.to_tuple("jpg" if jpeg else "x_n.npy", "json", "__key__")
    dataset = dataset.batched(files.kind.batch, collation_fn=_collate)
    for x, _sigma_n, _keys in WebLoader(dataset, batch_size=None, num_workers=1):
        yield _float(x)


def mosaicml_streaming(files: Files, start: int) -> Iterator[Tensor]:
    streaming = streaming_package()
    dataset = streaming.StreamingDataset(local=str(files.mds), shuffle=True, batch_size=files.kind.batch)
    if start:
        dataset.load_state_dict(dataset.state_dict(start, True))
    decode = _decode_jpeg if files.kind.jpeg else _as_tuple
    loader = DataLoader(dataset, files.kind.batch, num_workers=1, collate_fn=lambda batch: _collate(map(decode, batch)))
    for x, _sigma_n, _keys in loader:
        yield _float(x)


READERS: dict[str, Reader] = {
    "ours": ours,
    "webdataset": webdataset,
    "mosaicml-streaming": mosaicml_streaming,
    "webdataset, float16 npy": webdataset_of_npy,
}


def _collate(samples: Any) -> tuple[Tensor, Tensor, list[str]]:
    xs, metas, keys = zip(*samples, strict=True)
    sigmas = [meta["sigma_n"] if isinstance(meta, dict) else meta for meta in metas]
    return torch.from_numpy(np.stack(xs)), torch.tensor(sigmas), list(keys)


def _as_tuple(sample: dict[str, Any]) -> tuple[Any, float, str]:
    return sample["x"], sample["sigma_n"], sample["key"]


def _decode_jpeg(sample: dict[str, Any]) -> tuple[Any, float, str]:
    return np.asarray(Image.open(BytesIO(sample["x"])).convert("RGB")), sample["sigma_n"], sample["key"]


def _float(x: Tensor) -> Tensor:
    """Returns float32: uint8 (B, H, W, C) becomes (B, C, H, W) in [-1, 1], float16 keeps its values."""
    return x.permute(0, 3, 1, 2).float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x.float()


def streaming_package() -> Any:
    """Returns `streaming.base` of mosaicml-streaming. Installs the package if necessary.

    The package requires older versions of numpy and transformers than ours, torchvision, and the clients of six clouds.
    Reading local files needs none of them. So it is installed without dependencies into a separate folder, and only its
    `base` is imported, because its __init__ imports torchvision.
    """
    if "streaming" not in sys.modules:
        cache = paths.cache()
        folder = cache / "benchmark-peers"
        if not (folder / "streaming").is_dir():
            print(f"installing {REQUIREMENTS.name} into {folder}", file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
            subprocess.run([*command, "--requirement", str(REQUIREMENTS)], check=True)
        sys.path.append(str(folder))
        spec = find_spec("streaming")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        package = types.ModuleType("streaming")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["streaming"] = package
    return import_module("streaming.base")
