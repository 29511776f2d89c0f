"""Disks that are full, read-only, lost or broken: one line, nothing that was whole is lost, and the work goes on
when they are mended."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ambient_core import errors
from data_pipeline.shard import main as shard
from tests.conftest import Outcome
from tests.trainer.training.test_runs import assert_same_files
from trainer.checkpoint import checkpoints as checkpoints_module

Train = Callable[..., Outcome]


class Disk:
    """A file system of its own, of a given size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def mount(self, options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.folder], check=True)

    def change(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = Disk(folder)
    try:
        made.mount("size=100m")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a file system")
    yield made
    while os.path.ismount(folder):
        made.unmount()


def one_line(output: str, begins: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith(begins)]
    assert len(lines) == 1, output
    assert "Traceback" not in output
    return lines[0]


def checkpoints(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


@pytest.mark.parametrize("room", [8, 60, 150, 300, 420, 600])
def test_a_training_on_a_full_disk_stops_in_one_line_and_goes_on_when_there_is_room(
    room: int, disk: Disk, train: Train, tmp_path: Path
) -> None:
    """room: KiB; the smallest has none for the configuration, the largest for two checkpoints."""
    words = ["checkpoint.every=1", f"run_dir={disk.folder / 'run'}"]
    disk.change(f"size={room}k")
    code, output = train("", *words)
    assert code in (1, 2), output
    line = one_line(output, "failed: " if code == 1 else "error: ")
    assert "No space left on device" in line
    if (disk.folder / "run" / "checkpoints").is_dir():
        assert not [name for name in checkpoints(disk.folder / "run") if "partial" in name], "its room is given back"
    disk.change("size=100m")
    code, output = train("", *words)
    assert code == 0, output
    assert train("whole")[0] == 0
    assert_same_files(tmp_path / "whole", disk.folder / "run")


def test_shards_on_a_full_disk_are_gone_on_with_when_there_is_room(
    disk: Disk, pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def write(output: Path) -> int:
        return errors.run(
            lambda: shard([str(pictures), str(output), "--sigma", "0.4", "--shard-size", "8", "--workers", "1"])
        )

    disk.change("size=64k")
    assert write(disk.folder / "shards") == 1
    assert "No space left on device" in one_line(capfd.readouterr().err, "failed: ")
    disk.change("size=100m")
    assert write(disk.folder / "shards") == 0
    assert write(tmp_path / "whole") == 0
    for file in (tmp_path / "whole").iterdir():
        assert (disk.folder / "shards" / file.name).read_bytes() == file.read_bytes()


def test_a_read_only_disk_is_said_and_the_run_on_it_can_still_be_read(disk: Disk, train: Train) -> None:
    words = [f"run_dir={disk.folder / 'run'}"]
    assert train("", *words)[0] == 0
    disk.change("ro")
    code, output = train("", *words, "steps=8")
    assert code == 2
    assert "Read-only file system" in one_line(output, "error: ")
    assert checkpoints(disk.folder / "run") == {"latest", "step-00000003", "step-00000006"}


def test_a_disk_that_was_lost_is_said_and_nothing_is_written_in_its_place(
    disk: Disk, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    write = checkpoints_module.write

    def lose_it_first(*arguments: object) -> None:
        if not begun:
            disk.unmount()
        begun.append(1)
        write(*arguments)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(checkpoints_module, "write", lose_it_first)
    code, output = train("", f"run_dir={disk.folder / 'run'}")
    assert code == 1
    assert "cannot write the checkpoint" in one_line(output, "failed: ")
    assert not list(disk.folder.iterdir())


def test_an_error_of_the_disk_keeps_the_last_good_checkpoint(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("run", "steps=3")[0] == 0

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module, "write", broken)
        code, output = train("run")
    assert code == 1
    line = one_line(output, "failed: ")
    assert "Input/output error" in line
    assert "the last good one is" in line
    assert checkpoints(tmp_path / "run") == {"latest", "step-00000003"}
    assert train("run")[0] == 0
    assert train("whole")[0] == 0
    assert_same_files(tmp_path / "whole", tmp_path / "run")
