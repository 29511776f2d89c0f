"""The choice of the checkpoint from which a run resumes: the newest that is complete and undamaged."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from ambient_core.errors import UserError
from trainer.checkpoint.checkpoints import Checkpoints, named
from trainer.checkpoint.state import AnotherFormat, read_state
from trainer.checkpoint.tensors import read_tensors
from trainer.engine.distributed import Ranks


def newest_intact(checkpoints: Checkpoints, names: Iterable[str], ranks: Ranks) -> tuple[Path | None, str | None]:
    """Returns the newest intact checkpoint, or None if there is none yet, and a warning if it is not the newest. A
    collective.

    names: names of its tensor files. Newer checkpoints that are damaged are renamed to step-N.torn and kept.
    Checkpoints newer than the one that `latest` names are left alone, because a person may have gone back. Raises
    UserError if all checkpoints are damaged."""
    chosen, warning, failed = -1, None, None
    if ranks.is_main:
        try:
            chosen, warning = _choose(checkpoints, list(names))
        except (UserError, OSError) as error:  # the other ranks wait for this one
            failed = error
    if ranks.any(failed is not None):
        raise failed or UserError(
            f"{checkpoints.folder}: rank 0 found no intact checkpoint", field=checkpoints.folder, code="not_found"
        )
    chosen = int(ranks.max(torch.tensor(chosen, device=ranks.device)))
    return (None if chosen < 0 else checkpoints.path(chosen)), warning


def _choose(checkpoints: Checkpoints, names: list[str]) -> tuple[int, str | None]:
    steps, pointer = checkpoints.steps(), checkpoints.folder / "latest"
    if not steps and not pointer.is_file():
        return -1, None
    name = named(pointer) if pointer.is_file() else ""
    known = [step for step in steps if checkpoints.path(step).name == name]
    problems = (
        []
        if known
        else [f"{pointer} names {name!r}, which does not exist" if name else f"{pointer} is missing or damaged"]
    )
    torn: list[int] = []
    for step in reversed([step for step in steps if not known or step <= known[0]]):
        if (problem := damage(checkpoints.path(step), names)) is None:
            return step, _set_aside(checkpoints, torn, problems, step)
        problems.append(problem)
        torn.append(step)
    raise UserError(
        f"{'; '.join(problems)}; no checkpoint in {checkpoints.folder} is intact: move that folder away to start again",
        field=checkpoints.folder,
        code="unreadable",
    )


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


def damage(path: Path, names: list[str]) -> str | None:
    """Returns why a run cannot resume from a checkpoint, or None if it can. names: names of its tensor files, in
    addition to those of the pool.

    Each file has a checksum, so a file that was cut anywhere, or in which a bit has flipped, is detected."""
    try:
        pools = read_state(path).pools
    except AnotherFormat:
        return None  # it is intact; reading it raises the error again
    except UserError as error:
        return str(error)
    for name in [*names, *(f"pool-{rank:05d}-of-{pools:05d}" for rank in range(pools))]:
        try:
            read_tensors(path, name)
        except UserError as error:
            return str(error)
    return None
