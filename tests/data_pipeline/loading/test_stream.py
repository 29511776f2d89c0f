"""A stream goes on without shards that fail, where that is asked for, and leaves nothing behind when it ends."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch

from ambient_core.errors import UserError, WorkFailed
from data_pipeline.loading.config import DataConfig, Layout
from data_pipeline.loading.loader import Loader
from tests.refusals import refused
from tests.waiting import HANG_S, until

CPU = torch.device("cpu")
STEPS = 16


@pytest.fixture
def damaged(shards: Path, tmp_path: Path) -> Path:
    """Two of the eight shards are not what the index says."""
    shutil.copytree(shards, tmp_path / "damaged")
    for name in ("shard-000002.tar", "shard-000005.tar"):
        os.truncate(tmp_path / "damaged" / name, 3000)
    return tmp_path / "damaged"


def global_keys(config: DataConfig, world: int) -> tuple[list[list[str]], int]:
    """Keys of each step's global batch, and how many samples were skipped on all ranks."""
    loaders = [Loader(config, Layout(8, 8 // world, rank, world), 5, CPU) for rank in range(world)]
    ranks = [list(islice(loader.stream(0), STEPS)) for loader in loaders]
    assert {len(batch) for batches in ranks for batch in batches} == {8 // world}
    steps = [[key for batches in ranks for key in batches[step].keys] for step in range(STEPS)]
    return steps, sum(loader.skipped for loader in loaders)


def test_others_of_the_group_stand_in_for_a_failed_shard_on_any_ranks(
    shards: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, none_skipped = global_keys(DataConfig(str(shards), workers=0, group=4), 1)
    found, skipped = global_keys(DataConfig(str(damaged), workers=0, group=4, on_error="skip"), 1)
    warnings = capsys.readouterr().err.splitlines()
    assert [w.split(": ")[2].rpartition("/")[2] for w in sorted(warnings) if "are replaced by" in w] == [
        "shard-000002.tar",
        "shard-000005.tar",
    ]
    assert none_skipped == 0
    lost = {key for step in whole for key in step} - {key for step in found for key in step}
    assert len(lost) == 16, "the samples of two shards of 8"
    pairs = [(a, b) for step, other in zip(whole, found, strict=True) for a, b in zip(step, other, strict=True)]
    assert all((a in lost) == (a != b) for a, b in pairs), "all others stay where they were"
    assert skipped == sum(a in lost for a, _ in pairs) > 0
    for world, workers in [(2, 0), (4, 2), (8, 0)]:
        config = DataConfig(str(damaged), workers=workers, group=4, on_error="skip")
        assert global_keys(config, world) == (found, skipped)


def test_a_failed_shard_stops_the_run_unless_told_otherwise(damaged: Path) -> None:
    with refused("shard-000002.tar", "unreadable"):
        global_keys(DataConfig(str(damaged), workers=0, group=4), 1)


def test_too_many_open_files_is_not_a_shards_fault(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under on_error=skip it would pass for a data set that is lost."""

    def refusing(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    loader = Loader(DataConfig(str(shards), workers=0, on_error="skip"), Layout(8, 8, 0, 1), 5, CPU)
    monkeypatch.setattr(Path, "open", refusing)
    with refused("shard-000006.tar", "unreadable"):
        next(loader.stream(0))


def test_a_group_without_a_good_shard_stops_the_run(damaged: Path) -> None:
    with pytest.raises(WorkFailed, match=r"3000 bytes.*no other shard of its shuffle block can be read"):
        global_keys(DataConfig(str(damaged), workers=0, group=1, on_error="skip"), 1)


def test_a_shard_that_is_mended_is_read_again_in_the_next_epoch(shards: Path, damaged: Path) -> None:
    loader = Loader(DataConfig(str(damaged), workers=0, group=8, on_error="skip"), Layout(4, 4, 0, 1), 5, CPU)
    stream = loader.stream(0)
    for _ in range(15):  # an epoch of 60
        next(stream)
    skipped = loader.skipped
    assert skipped == 16
    for name in ("shard-000002.tar", "shard-000005.tar"):
        shutil.copy(shards / name, damaged / name)
    for _ in range(15):
        next(stream)
    stream.close()
    assert loader.skipped == skipped


def of_another(name: str) -> bool:
    """Whether a living process other than this one and its children made this shared memory (torch_PID_...)."""
    pid = next((int(part) for part in name.split("_") if part.isdigit()), 0)
    me = psutil.Process()
    return psutil.pid_exists(pid) and pid not in {me.pid, *(child.pid for child in me.children(recursive=True))}


def left() -> Counter[str]:
    """Child processes, open files, and named shared memory, each as often as it is there."""
    gc.collect()
    files = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    # Python's own heap for counters, and fonts of plots that tests before drew, come and go when they like.
    found = Counter(file for file in files if "/pym-" not in file and not file.endswith(".ttf"))
    found["child processes"] = len(psutil.Process().children(recursive=True))
    return found + Counter(
        name for name in os.listdir("/dev/shm") if name.startswith(("torch_", "psm_")) and not of_another(name)
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["closed", "dropped", "exception in use", "exception in a worker"])
def test_nothing_is_left_when_a_stream_ends(how: str, workers: int, shards: Path, damaged: Path) -> None:
    good = Loader(DataConfig(str(shards), workers=workers, group=2), Layout(8, 8, 0, 1), 0, CPU)
    bad = Loader(DataConfig(str(damaged), workers=workers, group=2), Layout(8, 8, 0, 1), 0, CPU)
    next(good.stream(0))  # whatever torch sets up once
    before, caught = left(), None
    stream = (bad if how == "exception in a worker" else good).stream(0)
    try:
        for step, _ in enumerate(stream):
            if step == 2 and how == "exception in use":
                raise RuntimeError
            if step == 2 and how in ("closed", "dropped"):
                break
    except (RuntimeError, UserError) as error:
        caught = error  # its traceback is kept, with all that its frames hold
    if how in ("closed", "exception in use"):
        stream.close()
    del stream
    # Queues close their pipes in a thread of theirs; and what tests before have left may go meanwhile.
    until(lambda: not left() - before, "nothing more open than before")
    assert (caught is not None) == how.startswith("exception")


def test_ctrl_c_ends_the_background_processes(shards: Path) -> None:
    program = f"""
import psutil, signal, sys, time, torch
from data_pipeline.loading.config import DataConfig, Layout
from data_pipeline.loading.loader import Loader
from tests.waiting import HANG_S, until
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
stream = Loader(DataConfig({str(shards)!r}, workers=2), Layout(8, 8, 0, 1), 0, torch.device("cpu")).stream(0)
next(stream)
print(*(child.pid for child in psutil.Process().children()), flush=True)
while True:
    next(stream)
    time.sleep(0.01)
"""
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    children = [int(pid) for pid in process.stdout.readline().split()]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=HANG_S)
    assert len(children) == 2
    assert errors.rstrip().endswith("KeyboardInterrupt")
    until(lambda: not any(psutil.pid_exists(child) for child in children), "an end of the background processes")
