"""Kills trainings and the shard writer at random moments, starts them again, and compares with what was left alone.

    python -m tests.faults.campaign --rounds 200          about an hour of two cores; 6 rounds are a test

A round is a training on one or two ranks, or a writing of shards. It is killed one to three times by SIGKILL, SIGTERM,
SIGINT or SIGUSR2, after a random time, after a random step, or in the middle of a save, and started again until it is
done. Then its files must have the bits of an undisturbed one's, each step must be logged once, and training must have
seen every sample once an epoch. Ends with one line of JSON; what a round that failed has left stays in FOLDER.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.training import step as step_module

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image
from safetensors.numpy import load_file
from tqdm import tqdm

from ambient_core import errors
from data_pipeline import shard
from tests.faults.starts import Start, preload
from trainer import train

TINY = Path(__file__).parent.parent / "tiny.yaml"
PICTURES, BATCH, STEPS, KEPT = 60, 12, 30, 2
"""Six epochs of five steps. KEPT: checkpoints."""
LAST = "start-last"
"""In the order of their names, after the starts that are numbered."""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


@dataclass
class Outcome:
    """Of rounds. problems: of those that failed. kills: by what was killed, when and how."""

    rounds: int = 0
    failures: int = 0
    lost: int = 0
    twice: int = 0
    problems: list[str] = field(default_factory=list[str])
    kills: Counter[str] = field(default_factory=Counter[str])


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m tests.faults.campaign",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--rounds", type=int, default=200, help="(default: 200)")
    p.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    p.add_argument("--folder", type=Path, help="where rounds are made (default: a temporary one)")
    args = p.parse_args(argv)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="campaign-"))
    outcome = campaign(args.rounds, args.seed, folder)
    for name, count in sorted(outcome.kills.items()):
        print(f"{count:5d}  {name}")
    print("\n".join(outcome.problems))
    if not outcome.failures and args.folder is None:
        shutil.rmtree(folder)
    print(
        json.dumps(
            {
                "rounds": outcome.rounds,
                "failures": outcome.failures,
                "samples_lost": outcome.lost,
                "samples_twice": outcome.twice,
            }
        )
    )
    return errors.FAILED if outcome.failures else errors.DONE


def campaign(rounds: int, seed: int, folder: Path) -> Outcome:
    """folder: an empty one."""
    preload()
    outcome, rng = Outcome(), random.Random(seed)
    pictures = pictures_in(folder / "pictures")
    whole: dict[str, Undisturbed] = {
        kind: Undisturbed(work, folder / "undisturbed" / kind)
        for kind, work in {
            "shards": Shards(pictures),
            "1 rank": Training(pictures, 1),
            "2 ranks": Training(pictures, 2),
        }.items()
    }
    for number in tqdm(range(rounds), unit="round", desc="campaign"):
        kind = list(whole)[number % len(whole)]
        place, killed, problems = folder / f"{number:04d}-{kind.replace(' ', '-')}", outcome.kills.total(), list[str]()
        while not problems and outcome.kills.total() == killed:  # it may be done before the moment to kill it
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            problems = _round(whole[kind], kind, place, rng, outcome)
        outcome.rounds += 1
        if problems:
            outcome.failures += 1
            outcome.problems += [f"{place}: {problem}" for problem in problems]
        else:
            shutil.rmtree(place)
    return outcome


def _round(whole: Undisturbed, kind: str, place: Path, rng: random.Random, outcome: Outcome) -> list[str]:
    work = whole.work
    for number in range(1, rng.randint(1, 3) + 1):
        start = work.start(place, f"start-{number}", rng)
        moment, when = work.moment(place, f"start-{number}", whole.seconds, rng)
        if not start.wait(moment):
            if codes := [code for code in start.end() if code]:
                return [f"start {number} ended with {codes} before it was killed"]
            break
        chosen = rng.choice(SIGNALS)
        ranks = rng.choice([range(work.ranks), [rng.randrange(work.ranks)]])
        start.send(chosen, ranks, group=rng.random() < 0.5)
        outcome.kills[f"{kind}, {when}, {chosen.name}{' to one of two' if len(ranks) < work.ranks else ''}"] += 1
        codes = start.end()
        if chosen != signal.SIGKILL and not set(codes) <= {errors.DONE, errors.INTERRUPTED, 130, -chosen}:
            return [f"start {number} ended with {codes} after {chosen.name}, {when}"]
    codes = work.start(place, LAST, rng).end()
    if any(codes):
        return [f"the last start, which nothing killed, ended with {codes}"]
    lost, twice, told = work.account(place)
    outcome.lost, outcome.twice = outcome.lost + lost, outcome.twice + twice
    return differences(whole, place) + told


def differences(whole: Undisturbed, place: Path) -> list[str]:
    """What is there must be as in the undisturbed work, and what must be there is."""
    files = whole.work.files(place)
    problems = [f"{name} differs" for name, digest in files.items() if whole.files.get(name, digest) != digest]
    problems += [f"{name} is missing" for name in whole.files.keys() - files.keys() if whole.work.needed(name)]
    problems += [f"{name} is left over" for name in files.keys() - whole.files.keys()]
    return problems + whole.work.surplus(place)


@dataclass
class Undisturbed:
    """What a piece of work leaves, and how long it takes, where nothing happens to it."""

    work: Shards | Training
    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        began = time.monotonic()
        codes = self.work.start(self.folder, LAST, random.Random(0), undisturbed=True).end()
        assert not any(codes), f"undisturbed it ends with {codes}: {self.folder}"
        self.seconds, self.files = time.monotonic() - began, self.work.files(self.folder)
        assert self.work.account(self.folder) == (0, 0, [])


@dataclass(frozen=True)
class Shards:
    """The writing of shards."""

    pictures: Path
    ranks: int = 1

    def start(self, place: Path, name: str, rng: random.Random, undisturbed: bool = False) -> Start:
        options = f"--sigma 0.4 --shard-size 5 --workers {rng.choice('12')}".split()
        words = [str(self.pictures), str(place / "shards"), *options]
        return Start(lambda rank: errors.run(lambda: shard.main(words)), 1, place, name)

    def moment(self, place: Path, name: str, seconds: float, rng: random.Random) -> tuple[Callable[[], bool], str]:
        if rng.random() < 0.5:
            return _after(rng.uniform(0, seconds)), "any time"
        number = rng.randrange(PICTURES // 5)
        return lambda: len(list((place / "shards").glob("*.tar*"))) > number, "between shards"

    def files(self, place: Path) -> dict[str, str]:
        return _digests(place / "shards", lambda path: True)

    def needed(self, name: str) -> bool:
        return True

    def surplus(self, place: Path) -> list[str]:
        return []

    def account(self, place: Path) -> tuple[int, int, list[str]]:
        return 0, 0, []


@dataclass(frozen=True)
class Training:
    """A training on some ranks, with all its parts. It notes which samples each step takes. One that is asked to
    stop writes a checkpoint of a step that others do not; so the undisturbed one keeps a checkpoint of each step."""

    pictures: Path
    ranks: int

    def start(self, place: Path, name: str, rng: random.Random, undisturbed: bool = False) -> Start:
        shards = self.pictures.parent / "undisturbed" / "shards" / "shards"
        words = [
            str(TINY),
            f"run_dir={place / 'run'}",
            f"data.shards={shards}",
            f"data.workers={rng.choice((0, 1))}",
            f"batch_size={BATCH}",
            f"steps={STEPS}",
            "ema={snapshots: {every: 10}}",
            f"checkpoint={{every: {1 if undisturbed else 2}, keep: {STEPS if undisturbed else KEPT}}}",
        ]

        def command(rank: int) -> int:
            trace = os.open(place / f"{name}-{rank}.trace", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            loss = step_module.step_loss

            def traced(run: Any, batch: Any, step: int, *rest: Any) -> Any:
                os.write(trace, json.dumps([step, list(batch.keys)]).encode() + b"\n")
                return loss(run, batch, step, *rest)

            step_module.step_loss = traced
            return errors.run(lambda: train.main(words))

        return Start(command, self.ranks, place, name)

    def moment(self, place: Path, name: str, seconds: float, rng: random.Random) -> tuple[Callable[[], bool], str]:
        chosen = rng.choice(("any time", "after a step", "in a save"))
        if chosen == "any time":
            return _after(rng.uniform(0, seconds)), chosen
        steps = rng.randrange(STEPS)
        trace, checkpoints = place / f"{name}-0.trace", place / "run" / "checkpoints"

        def stepped() -> bool:
            return trace.is_file() and trace.read_bytes().count(b"\n") > steps

        if chosen == "after a step":
            return stepped, chosen
        late = rng.uniform(0, 0.01)

        def saving() -> bool:
            if stepped() and any(checkpoints.glob(".*.partial")):
                time.sleep(late)
                return True
            return False

        return saving, chosen

    def files(self, place: Path) -> dict[str, str]:
        """The bits of all tensors that are kept."""
        return _digests(place / "run", lambda path: path.suffix == ".safetensors" or path.parent.name == "checkpoints")

    def needed(self, name: str) -> bool:
        return not name.startswith("checkpoints/step-") or name.startswith(f"checkpoints/step-{STEPS:08d}")

    def surplus(self, place: Path) -> list[str]:
        kept = len(list((place / "run" / "checkpoints").glob("step-*")))
        return [] if kept == KEPT else [f"{kept} checkpoints are kept, not {KEPT}"]

    def account(self, place: Path) -> tuple[int, int, list[str]]:
        """Samples that an epoch lacks, samples that it has more than once, and what else is wrong. A step that a
        later start has done again counts as it was done then."""
        taken: dict[tuple[int, int], list[str]] = {}
        for name in sorted({path.stem.rpartition("-")[0] for path in place.glob("*.trace")}):
            for rank in range(self.ranks):
                for line in (place / f"{name}-{rank}.trace").read_text().splitlines():
                    step, keys = json.loads(line)
                    taken[step, rank] = keys
        seen = [key for step in range(STEPS) for rank in range(self.ranks) for key in taken.get((step, rank), [])]
        epochs = [Counter(seen[at : at + PICTURES]) for at in range(0, STEPS * BATCH, PICTURES)]
        lost = sum(PICTURES - len(epoch) for epoch in epochs)
        twice = sum(count - 1 for epoch in epochs for count in epoch.values())
        records = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
        logged = [record["step"] for record in records if "metrics" in record]
        told = [] if logged == sorted(set(logged)) else ["metrics.jsonl has steps twice, or out of order"]
        return lost, twice, told + ([f"{lost} samples lost, {twice} seen twice"] if lost or twice else [])


def _after(seconds: float) -> Callable[[], bool]:
    moment = time.monotonic() + seconds
    return lambda: time.monotonic() > moment


def _content(path: Path) -> bytes:
    """Of tensors: the header that safetensors writes has its entries in any order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    tensors = load_file(path)
    return b"".join(name.encode() + tensors[name].tobytes() for name in sorted(tensors))


def _digests(folder: Path, chosen: Callable[[Path], bool]) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(_content(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and chosen(path)
    }


def pictures_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (PICTURES, 16, 16), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


if __name__ == "__main__":
    sys.exit(main())
