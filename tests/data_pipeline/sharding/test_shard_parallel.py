"""The same bytes whoever writes them; a call that was killed goes on; nothing is left running."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from ambient_core.errors import Code, UserError, WorkFailed
from data_pipeline.corruption.corruption import Gaussian
from data_pipeline.format.index import NAME, read_index
from data_pipeline.inputs.sources import open_source
from data_pipeline.shard import shard
from data_pipeline.sharding import plan
from data_pipeline.sharding.plan import Request
from data_pipeline.sharding.progress_records import finished
from data_pipeline.sharding.shard_dataset import preprocess
from data_pipeline.sharding.workers import Work, write_shards
from tests.conftest import ROOT
from tests.refusals import refused
from tests.waiting import HANG_S, until


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    workers: int, pictures: Path, shards: Path, tmp_path: Path
) -> None:
    shard(str(pictures), tmp_path / "out", Gaussian(0.4), shard_size=8, workers=workers)
    assert contents(tmp_path / "out") == contents(shards)


def test_a_plan_shared_by_two_jobs_gives_the_same_bytes(pictures: Path, shards: Path, tmp_path: Path) -> None:
    """As array jobs do: each writes the shards j, j + 2, ... of the plan; a later call finds them finished, and
    merges."""
    output = str(tmp_path / "out")
    request = Request(str(pictures), Gaussian(0.4), shard_size=8)
    source = open_source(request.source)
    planned = plan.Plan(request.recorded(), 60, plan.digest_of_keys(source, 60), 1, ((1, 16, 16),))
    os.mkdir(output)
    plan.write_plan(output, planned)
    for job in (1, 0):
        numbers = list(range(planned.shards))[job::2]
        write_shards(Work(request, planned, output), source, numbers, lambda _: None, lambda _: None, 1)
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in os.listdir(output)}
    preprocess(request, output, 0.01, partial(write_shards, workers=1))
    assert contents(tmp_path / "out") == contents(shards)
    assert all(path.stat().st_mtime_ns == before[path.name] for path in (tmp_path / "out").glob("*.tar"))


def test_workers_do_not_import_torch() -> None:
    command = "import sys, data_pipeline.shard; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "False\n"


SIDE = 600
SLOW = ["--sigma", "0.4", "--size", str(SIDE), "--channels", "3", "--shard-size", "2"]
"""60 images in 30 shards, which take some seconds: time to be killed in, also on a machine that does other work."""


@pytest.fixture(scope="module")
def uninterrupted(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    shard(str(pictures), output, Gaussian(0.4), size=SIDE, channels=3, shard_size=2)
    return output


Started = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(pictures: Path) -> Iterator[Started]:
    """Starts a sharding of its own process group, and stops it when some shards are finished, and not all. SIGCONT
    lets it go on."""
    running: list[subprocess.Popen[str]] = []

    def call(output: Path, workers: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "data_pipeline.shard", str(pictures), str(output), *SLOW, "--workers", str(workers)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        until(
            lambda: process.poll() is not None or len(list(output.glob("shard-*.json"))) >= 4, "4 shards", every=0.005
        )
        assert process.poll() is None, process.communicate()
        os.killpg(process.pid, signal.SIGSTOP)
        return process

    yield call
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=HANG_S)
    assert not alive, "processes are left"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_call_goes_on_where_it_was(
    workers: int, start: Started, pictures: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start(output, workers)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    os.killpg(process.pid, signal.SIGCONT)
    process.wait()
    wait_until_gone(children)
    with refused("out", "not_found"):
        read_index(output)
    done = {r.shard.name for r in finished(str(output), range(30)).values() if r.shard}
    assert 4 <= len(done) < 30
    (output / ".shard-000029.tar.partial").write_bytes(b"half")  # wherever the kill was: as in the middle of a shard,
    torn = output / max(done)
    torn.write_bytes(torn.read_bytes()[:700])  # and of a disk that lost what it had promised
    before = {name: (output / name).stat().st_mtime_ns for name in done - {torn.name}}
    shard(str(pictures), output, Gaussian(0.4), size=SIDE, channels=3, shard_size=2, workers=workers)
    assert contents(output) == contents(uninterrupted)
    assert {name: (output / name).stat().st_mtime_ns for name in before} == before, "finished shards are not redone"


def test_a_call_killed_between_the_index_and_the_end_is_tidied_up(pictures: Path, shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(shards, output)
    (output / "shard-000003.json").write_text("{}")
    planned = plan.Plan(Request(str(pictures), Gaussian(0.4), shard_size=8).recorded(), 60, "", 1, ((1, 16, 16),))
    plan.write_plan(str(output), planned)
    assert shard(str(pictures), output, Gaussian(0.4), shard_size=8).samples == 60
    assert contents(output) == contents(shards)


def test_a_worker_that_dies_is_one_line_and_nothing_runs_on(start: Started, tmp_path: Path) -> None:
    process = start(tmp_path / "out", 2)
    (server,) = [p for p in psutil.Process(process.pid).children() if p.children()]
    children = psutil.Process(process.pid).children(recursive=True)
    server.children()[0].kill()
    os.killpg(process.pid, signal.SIGCONT)
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 1
    assert "failed: " in err.splitlines()[-1]
    assert "a worker process died" in err.splitlines()[-1]
    assert "Traceback" not in err
    wait_until_gone(children)


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_all_and_says_how_to_go_on(workers: int, start: Started, tmp_path: Path) -> None:
    process = start(tmp_path / "out", workers)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGCONT)
    _, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 130
    assert "finished shards are kept; run again to resume" in err
    assert "Traceback" not in err
    wait_until_gone(children)
    assert not list((tmp_path / "out").glob(".*.partial"))


def begun(pictures: Path, output: Path) -> None:
    """An unfinished OUTPUT: too many of its images are bad."""
    shutil.copytree(pictures, output.parent / "pictures")
    (output.parent / "pictures" / "disc 59.png").write_bytes(b"")
    with pytest.raises(WorkFailed):
        shard(str(output.parent / "pictures"), output, Gaussian(0.4), shard_size=8)


def test_another_request_is_refused_where_one_was_begun(pictures: Path, tmp_path: Path) -> None:
    begun(pictures, tmp_path / "out")
    with refused("out", "mismatch"):
        shard(str(tmp_path / "pictures"), tmp_path / "out", Gaussian(0.4), shard_size=8, seed=1)


@pytest.mark.parametrize(
    ("change", "field", "mistake"), [("added", "SOURCE", "mismatch"), ("renamed", "SOURCE", "mismatch")]
)
def test_a_source_that_changed_since_is_refused(
    change: str, field: str, mistake: Code, pictures: Path, tmp_path: Path
) -> None:
    """The shards to come would hold other images than those that are there."""
    begun(pictures, tmp_path / "out")
    first = tmp_path / "pictures" / "disc 00.png"
    if change == "added":
        shutil.copy(first, tmp_path / "pictures" / "a.png")
    else:
        first.rename(tmp_path / "pictures" / "a.png")
    with refused(field, mistake):
        shard(str(tmp_path / "pictures"), tmp_path / "out", Gaussian(0.4), shard_size=8)


@pytest.mark.parametrize(
    ("text", "field", "mistake"),
    [
        ("{", "plan.json", "unreadable"),
        ('{"format": 9}', "plan.json", "unsupported"),
        ("[]", "plan.json", "unreadable"),
    ],
)
def test_a_broken_plan_is_named(text: str, field: str, mistake: Code, pictures: Path, tmp_path: Path) -> None:
    begun(pictures, tmp_path / "out")
    (tmp_path / "out" / plan.NAME).write_text(text)
    with refused(field, mistake):
        shard(str(tmp_path / "pictures"), tmp_path / "out", Gaussian(0.4), shard_size=8)


def test_somebody_elses_shards_are_never_removed(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "shard-000000.tar").write_bytes(b"theirs")
    with refused("OUTPUT", "in_use"):
        shard(str(pictures), tmp_path, Gaussian(0.4))
    assert (tmp_path / "shard-000000.tar").read_bytes() == b"theirs"


def test_two_calls_at_once_are_refused(pictures: Path, tmp_path: Path, start: Started) -> None:
    start(tmp_path / "out", 1)
    with pytest.raises(UserError, match="another process writes it"):
        shard(str(pictures), tmp_path / "out", Gaussian(0.4), size=SIDE, channels=3, shard_size=2)


@pytest.mark.parametrize("workers", [1, 2])
def test_output_on_a_url(workers: int, pictures: Path, shards: Path, tmp_path: Path) -> None:
    """memory:// belongs to one process; file:// to all."""
    from ambient_core import storage

    url = "memory://urls/out" if workers == 1 else f"file://{tmp_path}/out"
    index = shard(str(pictures), url, Gaussian(0.4), shard_size=8, workers=workers)
    assert index == read_index(shards)
    assert storage.list_files(url) == sorted(path.name for path in shards.iterdir())
    assert all(storage.read_bytes(storage.join(url, path.name)) == path.read_bytes() for path in shards.iterdir())
    assert shard(str(pictures), url, Gaussian(0.4), shard_size=8) == index


def test_an_unfinished_output_on_a_url_goes_on(pictures: Path, tmp_path: Path) -> None:
    from ambient_core import storage

    source, url = tmp_path / "pictures", "memory://unfinished/out"
    shutil.copytree(pictures, source)
    (source / "disc 20.png").write_bytes(b"")
    with pytest.raises(WorkFailed, match=r"see memory://unfinished/out/rejected\.jsonl; the first is disc 20_png"):
        shard(str(source), url, Gaussian(0.4), shard_size=8)
    assert len(finished(url, range(8))) == 3, "up to the shard that had one rejected too many"
    index = shard(str(source), url, Gaussian(0.4), shard_size=8, max_rejected=1)
    assert index.samples == 59
    assert json.loads(storage.read_bytes(f"{url}/{NAME}"))["rejected"] == 1


def test_an_index_of_100_000_shards_is_written_and_read_in_time_that_grows_with_them(tmp_path: Path) -> None:
    from data_pipeline.format.index import Shard, ShardIndex, parse_index, write_index

    many = tuple(Shard(f"shard-{i:06d}.tar", 1000, 10**9 + i, f"{i:064x}") for i in range(100_000))
    index = ShardIndex(many, ((3, 64, 64),), 0.1, 0.1, {"seed": 3, "corruption": {"kind": "gaussian"}})
    started = time.process_time()
    write_index(str(tmp_path), index)
    assert parse_index("index", (tmp_path / NAME).read_bytes()) == index
    assert time.process_time() - started < 100, "about a second; their square takes hours"
