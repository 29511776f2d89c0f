"""A real SLURM where `make test-slurm` has started one, and trainings submitted to it as a user submits them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ambient_core import errors
from slurm.job import attempts
from slurm.job.attempts import Attempt
from slurm.job.queue import listed
from slurm.submit import main
from tests.conftest import ROOT, TINY
from tests.trainer.training.test_runs import curve
from tests.waiting import until

STEPS = 60
SCRIPT = ROOT / "tests" / "slurm" / "cluster.sh"


def ask(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Job:
    """A submitted training. output: what the submission said."""

    id: str
    run_dir: Path
    output: str

    @property
    def step(self) -> int:
        """The last one that was logged."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0

    @property
    def starts(self) -> list[Attempt]:
        return attempts.read(self.run_dir)

    @property
    def reasons(self) -> list[str]:
        """What was decided after each start; empty where nothing was."""
        return [start.decision.reason if start.decision else "" for start in self.starts]

    @property
    def state(self) -> str:
        now = listed(self.id)
        return now.state if now else "UNKNOWN"

    def pid(self, rank: int, start: int = 0) -> int:
        return json.loads((self.starts[start].folder / f"rank-{rank}.json").read_text())["pid"]

    def reach(self, step: int) -> None:
        until(lambda: self.step >= step, f"{self.run_dir}: step {step}, {self.logs}")

    def end(self, state: str = "COMPLETED") -> None:
        """Waits until SLURM has done with it. SLURM's own list says what goes on: a job that is told of its preemption
        is SIGNALING for a moment."""
        until(lambda: not (now := listed(self.id)) or not now.active, f"the end of {self.id}: {self.logs}")
        assert self.state == state, self.logs

    @property
    def logs(self) -> str:
        folder = Path(json.loads((self.run_dir / "job.json").read_text())["folder"])
        return "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*_log.err")))

    def say(self, what: str, killed: float, start: int = 1) -> int:
        """Prints what an interruption cost, and returns the steps that were lost."""
        records = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        again = self.starts[start]
        before = max(record["step"] for record in records if record["time"] / 1000 < again.started)
        after = min(record["time"] for record in records if record["step"] > before) / 1000
        print(f"\nMEASURED {what}: {before - again.step} steps lost, {after - killed:.0f} s to the next new step")
        return before - again.step


@pytest.fixture(scope="session")
def slurm() -> str:
    """The folder of the test cluster. Where it must be there, as in CI, a skipped test is a failed one."""
    folder = os.environ.get("AMBIENT_TEST_SLURM")
    if folder is None:
        pytest.skip("no SLURM for tests was started: `make test-slurm` starts one")
    return folder


@pytest.fixture
def submit(slurm: str, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Job]]:
    """Submits a tiny training, two ranks on two nodes unless the cluster's fields say otherwise."""
    jobs: list[str] = []

    def call(name: str, *arguments: str, **fields: object) -> Job:
        cluster = {
            "kind": "slurm",
            "nodes": 2,
            "logs": str(tmp_path / "jobs"),
            "environment": {"OMP_NUM_THREADS": "1"},
            **fields,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(cluster))
        overrides = [f"run_dir={tmp_path / name}", f"data.shards={shards}", "engine.zero_stage=1", f"steps={STEPS}"]
        capfd.readouterr()
        code = errors.run(lambda: main([str(TINY), *overrides, "--cluster", str(path), *arguments]))
        output = "".join(capfd.readouterr())
        assert code == 0, output
        ids = [line.split()[1].rstrip(":") for line in output.splitlines() if line.startswith("job ")]
        jobs.extend(ids)
        return Job(ids[0] if ids else "", tmp_path / name, output)

    yield call
    for job in jobs:
        subprocess.run(["scancel", job.partition("_")[0]], check=False)
    for job in jobs:
        until(lambda job=job: not (now := listed(job)) or not now.active, f"the end of {job}")


@pytest.fixture(scope="session")
def uncut(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training on two ranks without a cluster, and without an interruption."""
    run_dir = tmp_path_factory.mktemp("uncut") / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [str(TINY), f"run_dir={run_dir}", f"data.shards={shards}", "engine.zero_stage=1", f"steps={STEPS}"]
    subprocess.run([*launcher, "-m", "trainer.train", *arguments], cwd=ROOT, check=True, capture_output=True)
    assert len(curve(run_dir)) == STEPS
    return run_dir
