"""The state of a training apart from its tensors: a checkpoint's state.json."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ambient_core.errors import UserError
from ambient_core.parsing import from_json, text_of
from trainer.checkpoint.retention import Tally
from trainer.checkpoint.tensors import CHECKSUM
from trainer.engine.loss_scaler import LossScale
from trainer.monitor.spikes import Usual

FORMAT, READABLE = 4, (3, 4)
"""Format 3 had no shares."""


@dataclass(frozen=True)
class TrainState:
    """The state of a training apart from its tensors. step: optimizer steps done. samples: position in the data.
    evaluations: network evaluations of samples so far, over all ranks. seconds: time spent training, over all starts.
    shape: (C, H, W) of an image. period: the period of consistency, once a budget has chosen it. tally: the tally of
    the metric by which checkpoints are judged. loss_scale: the loss scale of the next step. usual_loss: the usual
    losses of steps without and with consistency, if spikes are looked for. rolled_back: how often training has gone
    back, which leaves `samples` ahead of `step`. in_a_row: number of skipped steps in a row, up to this one. pools:
    number of particle files in the checkpoint. shares: number of files that hold each of the other states; 0 if one
    file has it as full tensors."""

    step: int
    samples: int
    evaluations: int
    seconds: float
    shape: tuple[int, int, int]
    period: int | None = None
    tally: Tally | None = None
    loss_scale: LossScale = field(default_factory=LossScale)
    usual_loss: tuple[Usual, Usual] = (Usual(), Usual())
    rolled_back: int = 0
    in_a_row: int = 0
    pools: int = 0
    shares: int = 0


def state_from(data: dict[str, Any]) -> TrainState:
    """Returns the state that `asdict` converted to this data. Raises KeyError or TypeError for other data."""
    tally = Tally(**data["tally"]) if data.get("tally") else None
    scale = LossScale(**data.get("loss_scale", {}))
    plain, consistency = (Usual(**each) for each in data.get("usual_loss", ({}, {})))
    parsed = {"shape": tuple(data["shape"]), "tally": tally, "loss_scale": scale, "usual_loss": (plain, consistency)}
    state = TrainState(**{**data, **parsed})
    numbers = [
        *state.shape,
        state.step,
        state.samples,
        state.evaluations,
        state.period or 1,
        scale.skipped,
        state.rolled_back,
        state.in_a_row,
        state.pools,
        state.shares,
        plain.steps,
        consistency.steps,
    ]
    if len(state.shape) != 3 or any(type(n) is not int or n < 0 for n in numbers) or 0 in state.shape:
        raise TypeError(f"its counts must be whole numbers, and its shape three positive ones: {numbers}")
    if not all(isinstance(x, int | float) for x in (state.seconds, scale.scale, plain.mean, consistency.mean)):
        raise TypeError("seconds, scale and means must be numbers")
    return state


def read_state(path: Path) -> TrainState:
    """Reads a checkpoint's state. Raises UserError: with code `unsupported` if another version wrote it in another
    format, with `unreadable` if it is missing or damaged."""
    try:
        data = from_json(text_of(path / "state.json"))
        if not isinstance(data, dict):
            raise ValueError("it must be a mapping of fields to values")
        recorded = data.pop(CHECKSUM, None)
        if recorded not in (None, with_checksum(data)[CHECKSUM]):
            raise ValueError("its checksum does not match its contents")
        if data.pop("format") not in READABLE:
            raise UserError(
                f"{path}: the checkpoint has another format; this version reads formats {READABLE[0]} to {FORMAT}",
                field=path,
                code="unsupported",
            )
        if recorded is None:
            raise ValueError("it has no checksum")
        return state_from(data)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / 'state.json'}: not a checkpoint's state: {error}", field=path / "state.json", code="unreadable"
        ) from None


def write_state(state: TrainState, checkpoint: Path) -> Path:
    """Writes a checkpoint's state, and returns its file."""
    file = checkpoint / "state.json"
    file.write_text(json.dumps(with_checksum({"format": FORMAT, **asdict(state)})))
    return file


def with_checksum(data: dict[str, Any]) -> dict[str, Any]:
    """Returns the data with the checksum of its contents added."""
    return {**data, CHECKSUM: f"{zlib.crc32(json.dumps(data, sort_keys=True).encode()):08x}"}
