"""Where training is: a checkpoint's state.json."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ambient_core.errors import UserError
from ambient_core.parsing import from_json, text_of
from trainer.checkpoint.retention import Tally
from trainer.checkpoint.tensors import CHECKSUM
from trainer.engine.loss_scaler import LossScale
from trainer.monitor.spikes import Usual

FORMAT = 3


@dataclass(frozen=True)
class TrainState:
    """Where training is. step: optimizer steps done. samples: position in the data. evaluations: network evaluations
    of samples so far, over all ranks. seconds: time spent training, over all starts. shape: (C, H, W) of an image.
    period: of consistency, once a budget has chosen it. tally: of the metric that checkpoints are judged by.
    loss_scale: of the step to come. usual_loss: of steps without and with consistency, where spikes are looked for.
    rolled_back: how often training has gone back, which leaves `samples` ahead of `step`. in_a_row: steps skipped
    up to this one. pools: how many files of particles the checkpoint has."""

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


def state_from(data: dict[str, Any]) -> TrainState:
    """From what `asdict` made of one. Raises KeyError or TypeError for other data."""
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
        plain.steps,
        consistency.steps,
    ]
    if len(state.shape) != 3 or any(type(n) is not int or n < 0 for n in numbers) or 0 in state.shape:
        raise TypeError(f"its counts must be whole numbers, and its shape three of them: {numbers}")
    if not all(isinstance(x, int | float) for x in (state.seconds, scale.scale, plain.mean, consistency.mean)):
        raise TypeError("seconds, scale and means must be numbers")
    return state


class AnotherFormat(UserError):
    """Of a checkpoint that another version wrote."""


def read_state(path: Path) -> TrainState:
    """Raises AnotherFormat, or UserError for a state.json that is missing or damaged."""
    try:
        data = from_json(text_of(path / "state.json"))
        if not isinstance(data, dict):
            raise ValueError("it must be a mapping of fields to values")
        recorded = data.pop(CHECKSUM, None)
        if recorded not in (None, with_checksum(data)[CHECKSUM]):
            raise ValueError("its checksum is not that of its contents")
        if data.pop("format") != FORMAT:
            raise AnotherFormat(
                f"{path}: another format of checkpoint; this version reads {FORMAT}", field=path, code="unsupported"
            )
        if recorded is None:
            raise ValueError("it has no checksum")
        return state_from(data)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path / 'state.json'}: not a checkpoint's state: {error}", field=path / "state.json", code="unreadable"
        ) from None


def with_checksum(data: dict[str, Any]) -> dict[str, Any]:
    """With the checksum of what is in it."""
    return {**data, CHECKSUM: f"{zlib.crc32(json.dumps(data, sort_keys=True).encode()):08x}"}
