"""Whether a job is started again, from what its starts left behind; and the watchdog that leaves stacks."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm.job import attempts
from slurm.job.attempts import Decision, Ending, Outcome
from slurm.job.environment import Place
from tests.conftest import ROOT
from tests.waiting import HANG_S


def checkpoint(run_dir: Path, step: int) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"step": step}))
    (folder.parent / "latest").write_text(folder.name)


def start(run_dir: Path, number: int, outcomes: dict[int, Ending], ranks: int = 2) -> Path:
    """A start of job 7 whose ranks all began, of which some said how they ended."""
    folders = [attempts.begin(run_dir, Place("7", number, rank, ranks, ("a", "b"), run_dir)) for rank in range(ranks)]
    for rank, ending in outcomes.items():
        attempts.end(folders[0], rank, ending)
    return folders[0]


def both(outcome: Outcome, message: str = "") -> dict[int, Ending]:
    return {rank: Ending(outcome, message) for rank in (0, 1)}


@pytest.mark.parametrize(
    ("endings", "code", "follows", "reason"),
    [
        (both("done"), 0, "nothing", "step 5: done"),
        (both("interrupted"), 0, "another start", "step 5: interrupted, and saved"),
        ({0: Ending("refused", "batch_size 8: no")}, 137, "a person", "step 5: refused: batch_size 8: no"),
        ({1: Ending("failed", "not finite")}, 1, "a person", "step 5: failed: not finite"),
        (
            {0: Ending("crashed", "OSError: x")},
            137,
            "another start",
            "killed: ranks 1 ended without a record (exit code 137); rank 0: OSError: x",
        ),
        (both("crashed", "OSError: x"), 1, "another start", "crashed: rank 0: OSError: x"),
        ({}, 137, "another start", "killed: ranks 0, 1 ended without a record (exit code 137)"),
    ],
)
def test_what_follows_an_end(endings: dict[int, Ending], code: int, follows: str, reason: str, tmp_path: Path) -> None:
    """Explained failures come again, so they are a person's; anything else is tried again."""
    start(tmp_path, 0, endings)
    checkpoint(tmp_path, 5)
    decision = attempts.decide(tmp_path, "7", 0, code, most=3)
    assert decision.follows == follows
    assert reason in decision.reason
    assert "\n" not in decision.reason


def test_two_starts_without_a_step_stop_the_job_and_one_does_not(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    start(tmp_path, 0, {})
    assert attempts.decide(tmp_path, "7", 0, 9, most=9).follows == "another start"
    start(tmp_path, 1, {})
    decision = attempts.decide(tmp_path, "7", 1, 9, most=9)
    assert decision.follows == "a person"
    assert "no progress in two starts" in decision.reason
    checkpoint(tmp_path, 6)
    assert attempts.decide(tmp_path, "7", 1, 9, most=9).follows == "another start"


def test_starts_whose_ranks_never_began_are_counted_too(tmp_path: Path) -> None:
    first = attempts.decide(tmp_path, "7", 0, 127, most=9)
    attempts.record(tmp_path / "attempts" / "7-0", first)
    assert first.follows == "another start"
    decision = attempts.decide(tmp_path, "7", 1, 127, most=9)
    assert decision.reason.startswith("step 0: ended with exit code 127 before the ranks began; no progress in")
    assert decision.follows == "a person"


def test_the_number_of_starts_is_bounded(tmp_path: Path) -> None:
    decisions = list[Decision]()
    for number in range(3):
        checkpoint(tmp_path, number)
        start(tmp_path, number, both("interrupted"))
        checkpoint(tmp_path, number + 1)
        decisions.append(attempts.decide(tmp_path, "7", number, 0, most=2))
    assert [decision.follows for decision in decisions] == ["another start", "another start", "a person"]
    assert "started again 2 times, which is max_requeues" in decisions[2].reason


def test_a_job_of_kind_local_counts_its_own_starts(tmp_path: Path) -> None:
    places = [Place("7", None, rank, 2, ("a",), tmp_path) for rank in (0, 1)]
    names = [attempts.begin(tmp_path, place).name for place in (*places, *places)]
    assert names == ["7-0", "7-0", "7-1", "7-1"]


HUNG = """
import re, sys, time
from pathlib import Path
from slurm.job.watchdog import Watchdog
import slurm.job.watchdog
slurm.job.watchdog.GRACE = 2.0
with Watchdog(3.0, Path(sys.argv[1])) as watchdog:
    for _ in range(22):
        time.sleep(0.25)
        watchdog.beat()
    print("beaten for longer than it waits", flush=True)
    re.match("(a+)+b", "a" * 60)  # for years, without giving up the interpreter's lock
"""


def test_a_rank_that_never_gives_up_the_interpreter_is_ended_with_its_stack_written(tmp_path: Path) -> None:
    stacks, begun = tmp_path / "stacks.txt", time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", HUNG, str(stacks)], cwd=ROOT, capture_output=True, text=True, timeout=HANG_S
    )
    assert "beaten" in result.stdout
    assert result.returncode == -signal.SIGALRM
    assert time.monotonic() - begun > 10, "each beat put it off"
    assert "in match" in stacks.read_text()


def test_a_watchdog_leaves_nothing_behind(tmp_path: Path) -> None:
    from slurm.job.watchdog import Watchdog

    with Watchdog(600, tmp_path / "stacks.txt") as watchdog:
        watchdog.beat()
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 60
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert not list(tmp_path.iterdir())
    with Watchdog(0, tmp_path / "stacks.txt"):
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
