"""The choice of the checkpoint from which a run resumes: the newest that is complete and undamaged."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ambient_core.errors import UserError
from trainer.checkpoint.checkpoints import Checkpoints, named
from trainer.engine.distributed import Ranks


def newest_intact(
    checkpoints: Checkpoints, read: Callable[[Path], object], ranks: Ranks
) -> tuple[Path | None, str | None]:
    """Reads the newest intact checkpoint, and returns it, or None if there is none yet; and a warning if it is not the
    newest. A collective.

    read: reads this rank's part of a checkpoint, and raises UserError with code `unreadable` if that is damaged. So
    what is read is verified, and no rank reads more than it needs. Newer checkpoints that are damaged for any rank are
    renamed to step-N.torn and kept. Checkpoints newer than the one that `latest` names are left alone, because a person
    may have gone back. Raises UserError if all checkpoints are damaged."""
    failed: UserError | OSError | None = None
    steps: list[int] = []
    problems: list[str] = []
    torn: list[int] = []
    if ranks.is_main:
        try:
            steps, problems = _candidates(checkpoints)
        except (UserError, OSError) as error:  # the other ranks wait for this one
            failed = error
    _raise_together(failed, checkpoints, ranks)
    while (step := _of_rank_0(steps.pop(0) if steps else -1, ranks)) >= 0:
        problem, path = None, checkpoints.path(step)
        try:
            read(path)
        except UserError as error:
            problem, failed = (str(error), None) if error.code == "unreadable" else (None, error)
        _raise_together(failed, checkpoints, ranks)
        if not ranks.any(problem is not None):
            warning = None
            try:
                warning = _set_aside(checkpoints, torn, problems, step) if ranks.is_main else None
            except OSError as error:
                failed = error
            _raise_together(failed, checkpoints, ranks)
            return path, warning
        if problem and not ranks.is_main:
            print(f"warning: rank {ranks.rank}: {problem}", file=sys.stderr)
        problems.append(problem or f"another rank cannot read its share of {path}")
        torn.append(step)
    if ranks.is_main and problems:
        failed = UserError(
            f"{'; '.join(problems)}; no checkpoint in {checkpoints.folder} is intact: move that folder away to start "
            "again",
            field=checkpoints.folder,
            code="unreadable",
        )
    _raise_together(failed, checkpoints, ranks)
    return None, None


def _of_rank_0(number: int, ranks: Ranks) -> int:
    """Returns rank 0's number, at least -1. A collective."""
    return int(ranks.max(torch.tensor(number if ranks.is_main else -1, device=ranks.device)))


def _raise_together(error: UserError | OSError | None, checkpoints: Checkpoints, ranks: Ranks) -> None:
    """Raises on all ranks if one of them has an error. A collective."""
    if ranks.any(error is not None):
        raise error or UserError(
            f"{checkpoints.folder}: another rank cannot read its share of a checkpoint; its message is above",
            field=checkpoints.folder,
            code="not_found",
        )


def _candidates(checkpoints: Checkpoints) -> tuple[list[int], list[str]]:
    """Returns the steps of the checkpoints to try, in order, and what is wrong with the pointer."""
    steps, pointer = checkpoints.steps(), checkpoints.folder / "latest"
    if not steps and not pointer.is_file():
        return [], []
    name = named(pointer) if pointer.is_file() else ""
    known = [step for step in steps if checkpoints.path(step).name == name]
    problems = (
        []
        if known
        else [f"{pointer} names {name!r}, which does not exist" if name else f"{pointer} is missing or damaged"]
    )
    return [step for step in reversed(steps) if not known or step <= known[0]], problems


def _set_aside(checkpoints: Checkpoints, torn: list[int], problems: list[str], step: int) -> str | None:
    for each in torn:
        path = checkpoints.path(each)
        kept = path.with_name(f"{path.name}.torn")
        if kept.exists():  # this step was damaged before: the newer copy is kept
            shutil.rmtree(kept)
        path.replace(kept)
    if not problems:
        return None
    checkpoints.point_at(step)
    warning = f"{'; '.join(problems)}; resuming from step {step}"
    if torn:
        warning += f", and {', '.join(checkpoints.path(each).name for each in torn)} was renamed to .torn"
    print(f"warning: {warning}", file=sys.stderr)
    return warning
