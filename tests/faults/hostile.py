"""Files that nobody wrote on purpose, and how each kind is read: the documented errors, little memory, nothing else.

    python -m tests.faults.hostile                  every file in tests/faults/hostile, and holes of 64 GiB, in 512 MiB

The folder has a folder for each of Victim's kinds. What a fuzzer finds is put there, and is a test from then on. Prints
what each file was told, and ends with code 1 where one ended otherwise than documented.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import shutil
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from ambient_core.errors import UserError, WorkFailed
from data_pipeline import shard
from data_pipeline.corruption.corruption import parse_corruption
from data_pipeline.format.index import NAME, read_index
from data_pipeline.inputs.sources import open_source
from data_pipeline.inspect import inspect
from data_pipeline.loading.batch_order import BatchOrder
from data_pipeline.loading.config import DataConfig, Layout
from data_pipeline.loading.loader import Loader
from slurm.cluster import read_cluster
from tests.faults.campaign import TINY, pictures_in
from trainer.checkpoint.state import read_state
from trainer.checkpoint.tensors import read_file
from trainer.config.run_config import load, load_as
from trainer.reports.study_config import StudyConfig
from trainer.tracking.config import LoggingConfig
from trainer.tracking.logger import MLflowLogger

FOLDER = Path(__file__).parent / "hostile"
MEMORY = 512 << 20
"""Bytes that reading a file may take."""
HOLE = 64 << 30

Read = Callable[[Path], object]
"""What is done with a file of a kind."""


class Victim:
    """A folder with good shards in it, of which hostile files take a part's place."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._good = folder, folder / "shards"
        words = [
            str(pictures_in(folder / "pictures")),
            str(self._good),
            "--size",
            "16",
            "--sigma",
            "0.4",
            "--shard-size",
            "30",
        ]
        shard.main(words)
        self.kinds: dict[str, Read] = {
            "index": self._index,
            "shard": self._shard,
            "inspected": self._inspected,
            "source": self._source,
            "picture": self._picture,
            "captions": self._captions,
            "words": lambda path: parse_corruption(path.read_text(errors="replace")[:1000]),
            "configuration": lambda path: load(path, ["run_dir=x", "data.shards=y"]),
            "override": lambda path: load(
                TINY, ["run_dir=x", "data.shards=y", path.read_text(errors="replace")[:10_000]]
            ),
            "cluster": read_cluster,
            "study": lambda path: load_as(StudyConfig, path),
            "state": self._state,
            "tensors": read_file,
            "records": self._records,
        }

    def _index(self, path: Path) -> None:
        use_index(self._put(path, NAME))

    def _shard(self, path: Path) -> None:
        use_shards(self._shard_folder(path))

    def _inspected(self, path: Path) -> None:
        if wrong := inspect(str(self._shard_folder(path)), verify=False)[2]:
            raise WorkFailed(wrong[0])

    def _shard_folder(self, path: Path) -> Path:
        """The index says what this shard's size is, as a hostile one would."""
        index = json.loads((self._good / NAME).read_text())
        index["shards"] = index["shards"][:1]
        index["shards"][0]["bytes"] = max(1, path.stat().st_size)
        folder = self._put(path, index["shards"][0]["name"])
        (folder / NAME).write_text(json.dumps(index))
        return folder

    def _source(self, path: Path) -> None:
        """Its name says what it is."""
        source = open_source(str(path))
        for i in range(min(len(source), 8)):
            source.read(i)

    def _picture(self, path: Path) -> None:
        open_source(str(self._alone(path, "a.png"))).read(0)

    def _captions(self, path: Path) -> None:
        folder = self._alone(path, {".csv": "metadata.csv", ".jsonl": "metadata.jsonl"}.get(path.suffix, "00.txt"))
        shutil.copy(self._folder / "pictures" / "00.png", folder / "00.png")
        open_source(str(folder)).read(0)

    def _state(self, path: Path) -> None:
        read_state(self._alone(path, "state.json"))

    def _records(self, path: Path) -> None:
        folder = self._alone(path, "metrics.jsonl")
        (folder / "mlflow.json").write_text('{"experiment_id": "1", "run_id": "abc", "sent": 1}')
        MLflowLogger(LoggingConfig(enabled=False), folder, {}, {}).close("FINISHED")

    def _alone(self, path: Path, name: str) -> Path:
        """A folder with nothing but this file, by that name."""
        folder = self._folder / "alone"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.link(path, folder / name)
        return folder

    def _put(self, path: Path, name: str) -> Path:
        """The good shards' folder, with this file in place of one of its own."""
        folder = self._folder / "spoilt"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._good, folder)
        (folder / name).unlink()
        os.link(path, folder / name)
        return folder


def use_index(folder: Path) -> None:
    index = read_index(folder)
    counts, shapes = [shard.samples for shard in index.shards], [shard.shape for shard in index.shards]
    BatchOrder(counts, shapes, 8, 0, 16)
    assert "/" not in "".join(shard.name for shard in index.shards)


def use_shards(folder: Path) -> None:
    loader = Loader(DataConfig(shards=str(folder), workers=0), Layout(8, 8, 0, 1), 0, torch.device("cpu"))
    for batch in itertools.islice(loader.stream(0), 8):
        assert batch.x_n.isfinite().all()
        assert batch.x_n.shape == (8, 1, 16, 16)


def documented(call: Callable[[], object]) -> str:
    """What a user is told, in one line; nothing where it succeeds."""
    try:
        call()
        return ""
    except (UserError, WorkFailed) as error:
        said = str(error)
    assert said.strip()
    assert "\n" not in said
    return said


def told(read: Read, path: Path) -> str:
    """The same, also of an OSError with a file's name, of which errors.run makes one line."""
    try:
        return documented(lambda: read(path))
    except OSError as error:
        if not error.filename:
            raise
        said = f"{error.filename}: {error.strerror}"
    assert "\n" not in said
    return said


def holes(folder: Path) -> Iterator[tuple[str, Path]]:
    """Kinds and files of 64 GiB that take no room on the disk: whole ones, and members of archives that say so."""
    for kind, name in {
        "index": "shards.json",
        "shard": "a.tar",
        "inspected": "a.tar",
        "picture": "a.png",
        "captions": "a.txt",
        "configuration": "a.yaml",
        "cluster": "a.yaml",
        "study": "a.yaml",
        "state": "a.json",
        "tensors": "a.safetensors",
    }.items():
        yield kind, _with_hole(folder / f"{kind} {name}", b"")
    for name in ("a.npy", "a.npz", "a.zip", "a.tif", "a.parquet", "a.arrow"):
        yield "source", _with_hole(folder / name, b"")
    member = tarfile.TarInfo("00.json")
    member.size = HOLE
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, HOLE
    attributes = tarfile.TarInfo("././@PaxHeader")
    attributes.type, attributes.size = tarfile.XHDTYPE, HOLE
    picture = tarfile.TarInfo("a.png")
    picture.size = HOLE
    for number, info in enumerate((member, name, attributes, picture)):
        for kind in ("shard", "inspected", "source"):
            yield kind, _with_hole(folder / f"{kind} {number}.tar", info.tobuf(tarfile.GNU_FORMAT))


def _with_hole(path: Path, start: bytes) -> Path:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + HOLE)
    return path


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m tests.faults.hostile", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.parse_args(argv)
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        kinds = Victim(Path(scratch)).kinds
        files = [(kind, path) for kind in kinds for path in sorted((FOLDER / kind).glob("*"))]
        for folder in (copies := Path(scratch) / "copies", large := Path(scratch) / "holes"):
            folder.mkdir()
        files = [(kind, Path(shutil.copy(path, copies / f"{kind} {path.name}"))) for kind, path in files]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        for kind, path in [*files, *holes(large)]:
            try:
                said = told(kinds[kind], path)
            except Exception:
                failures += 1
                said = f"FAILED\n{traceback.format_exc()}"
            print(f"{kind:13} {path.name:40} {said or 'is taken'}", flush=True)
    print(json.dumps({"files": len(files), "failures": failures}))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
