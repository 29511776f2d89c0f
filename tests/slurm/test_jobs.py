"""On a real SLURM: what is submitted, what is refused, sweeps, and jobs that stop and say why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ambient_core import errors
from slurm import status
from slurm.job.attempts import read
from slurm.submit import main
from tests.conftest import TINY
from tests.slurm.conftest import Job
from tests.trainer.training.test_runs import LOSS_TOLERANCE, curve
from tests.waiting import until
from trainer.checkpoint.progress import steps_done

pytestmark = pytest.mark.slurm
Submit = Callable[..., Job]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("partition: mian", "partition mian: no such partition; there are main, urgent"),
        ("gpus_per_node: 2\ntasks_per_node: 1", "the cluster refuses the job: "),
        ("mem_gb: 90000", "the cluster refuses the job: "),
        ("nodes: 4", "the cluster refuses the job: "),
        (
            "nodes: 2\nmin_nodes: 1\ntasks_per_node: 5",
            "batch_size 8: must be a multiple of the 5 ranks (1 nodes with 5 ranks each)",
        ),
    ],
)
def test_what_the_cluster_does_not_have_is_refused_in_one_line(
    fields: str, message: str, slurm: str, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(f"kind: slurm\nlogs: {tmp_path / 'jobs'}\n{fields}\n")
    arguments = [
        str(TINY),
        f"run_dir={tmp_path / 'run'}",
        f"data.shards={shards}",
        "--cluster",
        str(tmp_path / "c.yaml"),
    ]
    assert errors.run(lambda: main(arguments)) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert len(line) > len("error: the cluster refuses the job: ")
    assert not (tmp_path / "jobs").exists()


def test_a_dry_run_prints_the_script_and_sends_nothing(submit: Submit) -> None:
    job = submit("run", "--dry-run", min_nodes=1, cpus_per_task=2, tasks_per_node=2)
    assert job.id == ""
    for line in (
        "#SBATCH --nodes=1-2",
        "#SBATCH --cpus-per-task=4",
        "trap : TERM",
        "--kill-on-bad-exit=1 --open-mode=append --ntasks-per-node=2 --cpus-per-task=2 env -C ",
    ):
        assert line in job.output
    assert "batch 8 = 2 x 1 micro-batches x 4 ranks" in job.output
    assert not job.run_dir.exists()


def test_two_nodes_train_as_one_process_does(
    submit: Submit, train: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    job = submit("two", "steps=12")
    assert train("one", "steps=12")[0] == 0
    job.end()
    one, two = curve(tmp_path / "one"), curve(job.run_dir)
    assert one.keys() == two.keys()
    for step in one:
        assert two[step]["loss/ambient"] == pytest.approx(one[step]["loss/ambient"], rel=LOSS_TOLERANCE), step


def test_a_sweep_goes_on_around_a_point_that_fails_and_resume_submits_what_is_missing(
    submit: Submit, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = ["--sweep", "optimizer.lr=1e-3,1e30,2e-3,3e-3", "optimizer.warmup_steps=0", "optimizer.clip=0", "steps=8"]
    one = {"nodes": 1, "cpus_per_task": 2}
    first = submit("sweep", *sweep, "logging.enabled=true", **one)
    ids = [line.split()[1].rstrip(":") for line in first.output.splitlines() if line.startswith("job ")]
    assert [job.rpartition("_")[2] for job in ids] == ["0", "1", "2", "3"]
    assert len({job.partition("_")[0] for job in ids}) == 1, "one array"
    runs = {lr: first.run_dir / f"lr={lr}" for lr in ("1e-3", "1e30", "2e-3", "3e-3")}
    jobs = [Job(job, path, "") for job, path in zip(ids, runs.values(), strict=True)]
    for job in jobs:
        job.end("FAILED" if job.run_dir.name == "lr=1e30" else "COMPLETED")
    assert {lr: steps_done(path) for lr, path in runs.items()} == {"1e-3": 8, "1e30": 0, "2e-3": 8, "3e-3": 8}
    (start,) = read(runs["1e30"])
    assert start.decision
    assert "failed: the loss is not finite at step" in start.decision.reason, "explained, and so not tried again"

    capfd.readouterr()
    assert errors.run(lambda: status.main([str(first.run_dir)])) == 0
    shown = capfd.readouterr().out
    assert "lr=1e30: job " in shown
    assert "failed: the loss is not finite" in shown
    assert shown.count("COMPLETED, step 8 of 8 (100%)") == 3

    again = submit("sweep", *sweep, "--resume", "logging.enabled=true", **one)
    assert [line.split()[2] for line in again.output.splitlines() if line.startswith("job ")] == [str(runs["1e30"])]
    Job(again.id, runs["1e30"], "").end("FAILED")

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{first.run_dir / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ambient")
    assert experiment
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert found.keys() == {"sweep", *(path.name for path in runs.values())}
    parent = found.pop("sweep").info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent}
    assert found["lr=2e-3"].data.tags["sweep.optimizer.lr"] == '"2e-3"'


def test_a_reason_reaches_the_submitter(
    submit: Submit, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The shards vanish while the job waits: the rank's line is the status's, and it is not tried again."""
    shutil.copytree(shards, tmp_path / "copy")
    copy = f"data.shards={tmp_path / 'copy'}"
    job = submit("run", copy, nodes=1, setup=[f"mv {tmp_path / 'copy'} {tmp_path / 'away'}"])
    job.end("FAILED")
    assert job.reasons == [
        (
            f"step 0: refused: {tmp_path / 'copy'}: no such shard folder; make it with `python -m "
            f"data_pipeline.shard SOURCE {tmp_path / 'copy'}`"
        )
    ]
    assert errors.run(lambda: status.main([str(job.run_dir)])) == 0
    assert "refused: " in capfd.readouterr().out


def test_a_job_that_gets_nowhere_twice_stops_and_says_so(submit: Submit) -> None:
    job = submit("run", nodes=1, srun_args=["--chdir=/", "--no-such-option"])
    until(lambda: len(job.starts) == 2, f"a second start: {job.logs}")
    job.end("FAILED")
    assert [start.number for start in job.starts] == [0, 1]
    assert job.reasons[1].endswith(
        "before the ranks began; no progress in two starts: fix the cause, and submit it again"
    )
    assert json.loads((job.run_dir / "job.json").read_text())["job"] == job.id


def test_evaluations_are_one_array_and_find_what_one_process_finds(
    slurm: str, train: Callable[..., tuple[int, str]], pictures: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from slurm.evaluate import main as evaluate_by_jobs
    from trainer.evaluate import main as evaluate

    for name, rate in (("a", 1e-3), ("b", 1e-2)):
        assert train(name, "steps=1", f"optimizer.lr={rate}")[0] == 0
    (tmp_path / "c.yaml").write_text(f"kind: slurm\nlogs: {tmp_path / 'jobs'}\ntime_minutes: 10\n")
    runs = [str(tmp_path / name) for name in "ab"]
    words = [*runs, "--reference", str(pictures), "--number", "0", "--levels", "0.4", "1"]
    assert errors.run(lambda: evaluate_by_jobs([*words, "--cluster", str(tmp_path / "c.yaml")])) == 0
    said = capfd.readouterr().err
    ids = next(line for line in said.splitlines() if line.startswith("jobs ")).partition(";")[0].split()[1:]
    assert [job.rpartition("_")[2] for job in ids] == ["0", "1"], "one array"
    found = {path: json.loads(path.read_text()) for path in tmp_path.glob("?/evaluation/step-*/evaluation.json")}
    assert len(found) == 2
    for path in found:
        path.unlink()
    assert errors.run(lambda: evaluate(words)) == 0
    for path, kept in found.items():
        assert json.loads(path.read_text())["metrics"] == pytest.approx(kept["metrics"], rel=1e-5)
