"""On a real SLURM: whatever ends a training, it goes on, and ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.slurm.conftest import SCRIPT, Job, ask
from tests.trainer.training.test_runs import LOSS_TOLERANCE, curve, final
from tests.waiting import until
from trainer.checkpoint.progress import steps_done

pytestmark = pytest.mark.slurm
Submit = Callable[..., Job]


def assert_same_bits(one: Path, other: Path) -> None:
    for name in ("weights", "ema", "optimizer", "pool-00000-of-00002", "pool-00001-of-00002"):
        a, b = final(one, name), final(other, name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), f"{name} differs"


def assert_same_curve(one: Path, other: Path) -> None:
    a, b = curve(one), curve(other)
    assert a.keys() == b.keys()
    for step in a:
        assert b[step]["loss/ambient"] == pytest.approx(a[step]["loss/ambient"], rel=5 * LOSS_TOLERANCE), step


def test_a_signal_before_the_time_limit_loses_no_step_and_the_run_ends_with_the_same_bits(
    submit: Submit, uncut: Path
) -> None:
    job = submit("run", "logging.enabled=true", "checkpoint.every=1000")
    job.reach(5)
    ask("scancel", "--signal=USR2", job.id)
    killed = time.time()
    job.end()
    assert job.say("`scancel --signal=USR2`, as before a time limit", killed) == 0
    assert_same_bits(uncut, job.run_dir)
    first, second = job.starts
    assert job.reasons == [f"step {second.step}: interrupted, and saved", "step 60: done"]
    assert first.nodes == second.nodes == ("node1", "node2")

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{job.run_dir.parent / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("ambient").experiment_id])  # pyright: ignore[reportOptionalMemberAccess]
    tags = run.data.tags
    assert (tags["job.id"], tags["job.requeues"], tags["job.nodes"]) == (job.id, "1", "node1,node2")
    assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "loss/ambient")) == 60


def test_a_true_time_limit_is_survived(submit: Submit, tmp_path: Path) -> None:
    job = submit("run", "steps=100000", "checkpoint.every=100000", time_minutes=3, signal_delay_s=90)
    until(lambda: len(job.starts) == 2, f"a second start: {job.logs}")
    first, _ = job.starts
    assert first.decision
    job.reach(first.decision.step + 1)
    assert job.say("time limit of three minutes, signal 90 s before it", first.decision.time) == 0
    assert first.decision.time - first.started < 180, "the signal ended it, not the limit"


def test_a_preempted_job_saves_and_comes_back(submit: Submit, uncut: Path, tmp_path: Path) -> None:
    """A partition of higher priority takes both nodes: SIGTERM, and two minutes of grace."""
    job = submit("run", "checkpoint.every=1000")
    job.reach(5)
    killed = time.time()
    urgent = ask(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"
    ).strip()
    job.end()
    assert job.say("preempted by another partition (SIGTERM, grace of 120 s)", killed) == 0
    assert len(job.starts) == 2
    assert_same_bits(uncut, job.run_dir)
    assert "COMPLETED" in ask("scontrol", "show", "job", urgent)


def test_scontrol_requeue_loses_no_step(submit: Submit, uncut: Path) -> None:
    job = submit("run", "checkpoint.every=1000")
    job.reach(5)
    killed = time.time()
    ask("scontrol", "requeue", job.id)
    job.end()
    assert job.say("`scontrol requeue`", killed) == 0
    assert_same_bits(uncut, job.run_dir)


def test_a_rank_that_is_killed_costs_the_steps_since_the_last_checkpoint(submit: Submit, uncut: Path) -> None:
    job = submit("run", "checkpoint.every=10")
    job.reach(14)
    killed = time.time()
    os.kill(job.pid(0), signal.SIGKILL)
    job.end()
    assert job.say("`kill -9` of a rank, a checkpoint each 10 steps", killed) <= 10
    assert_same_bits(uncut, job.run_dir)
    assert "killed: ranks 0" in job.reasons[0]


def test_a_cancelled_job_is_not_started_again(submit: Submit) -> None:
    job = submit("run", "checkpoint.every=1000", "steps=100000")
    job.reach(5)
    ask("scancel", job.id)
    job.end("CANCELLED")
    time.sleep(3)
    assert job.state == "CANCELLED"
    assert (job.run_dir / "checkpoints" / "latest").is_file(), "and what it did is saved"


def test_a_drained_node_leaves_a_run_that_goes_on_with_one_rank_and_then_with_two(submit: Submit, uncut: Path) -> None:
    """Fewer nodes: the same batches, by two micro-batches a step."""
    job = submit("run", "checkpoint.every=1000", min_nodes=1)
    assert "micro_batch_size 4: as on 2 ranks" in job.output
    job.reach(5)
    ask("scontrol", "update", "nodename=node2", "state=drain", "reason=test")
    try:
        killed = time.time()
        ask("scancel", "--signal=USR2", job.id)
        until(lambda: len(job.starts) == 2, f"a second start: {job.logs}")
        job.reach(job.starts[1].step + 5)
    finally:
        ask("scontrol", "update", "nodename=node2", "state=resume")
    assert job.say("node drained, back with one of two", killed) == 0
    ask("scancel", "--signal=USR2", job.id)
    killed = time.time()
    job.end()
    assert job.say("back with both", killed, 2) == 0
    assert [start.ranks for start in job.starts] == [2, 1, 2]
    assert_same_curve(uncut, job.run_dir)


def test_a_node_that_slurm_lost_gives_way_to_the_new_start(submit: Submit) -> None:
    """slurmd dies and the rank lives on. SLURM starts the job anew on the other node: then two copies run, of which the
    older one saves and leaves."""
    job = submit("run", "checkpoint.every=100000", "steps=100000", nodes=1)
    job.reach(5)
    (node,) = job.starts[0].nodes
    old = job.pid(0)
    ask(str(SCRIPT), "node-kill", node)
    killed = time.time()
    try:
        until(lambda: len(job.starts) == 2, f"a second start: {job.logs}")
        began = job.step
        until(lambda: 0 in job.starts[0].endings, "the older start leaves")
        assert job.starts[0].endings[0].outcome == "interrupted"
        saved = steps_done(job.run_dir)
        assert saved >= began, "it trained on until it was told"
        job.reach(saved + 5)
        print(f"\nMEASURED `kill -9` of slurmd, one node: 0 steps lost, {time.time() - killed:.0f} s to five new steps")
        assert not Path(f"/proc/{old}").exists()
        steps = list(curve(job.run_dir))  # read once: the run goes on
        assert steps == list(range(1, len(steps) + 1)), "each step once, in order"
        assert "resuming at step" in job.logs
    finally:
        ask(str(SCRIPT), "node-up", node)
        until(lambda: ask("sinfo", "-h", "-n", node, "-o", "%T").split()[0] in ("idle", "mixed"), f"{node} is back")


HANG = """
import os, signal, time
if os.environ.get("SLURM_PROCID") == "1":
    signal.signal(signal.SIGUSR1, lambda *_: time.sleep(10**6))
"""


def test_a_hung_rank_is_noticed_all_ranks_say_where_they_are_and_the_job_goes_on(
    submit: Submit, uncut: Path, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HANG)
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path / "site")}
    job = submit("run", "checkpoint.every=10", hang_minutes=2, environment=environment)
    job.reach(11)
    killed = time.time()
    os.kill(job.pid(1), signal.SIGUSR1)
    job.end()
    assert job.say("a rank hangs, hang_minutes 2", killed) <= 10
    assert job.starts[0].hung == (0, 1)
    assert "stacks of ranks 0, 1" in job.reasons[0]
    assert "sitecustomize.py" in (job.starts[0].folder / "rank-1-stacks.txt").read_text()
    assert "/code/trainer/training/loop.py" in (job.starts[0].folder / "rank-0-stacks.txt").read_text()
    assert_same_bits(uncut, job.run_dir)
