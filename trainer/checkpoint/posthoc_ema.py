"""Averages of the weights of any width, computed after training from snapshots of averages of other widths (Karras et
al. 2024, arXiv 2312.02696, sec. 3).

The profile of an average at step T is p(t) = (gamma + 1) t^gamma / T^(gamma + 1), for t from 0 to T. It says how much
the weights at each time t count. One update per step gives the integral of p over that step exactly. A weighted sum of
stored averages approximates an average that was not stored as well as the same sum of their profiles approximates its
profile.

RUN_DIR/ema/step-00000500-0.05.safetensors   float32 by parameter name; its metadata has the step and the width
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ambient_core.errors import UserError, WorkFailed
from trainer.checkpoint.shares import read_tensors
from trainer.checkpoint.state import TrainState
from trainer.checkpoint.tensors import State, write_whole
from trainer.engine.distributed import Ranks
from trainer.engine.ema import WIDEST, AnyEMA, PowerEMA, power_of

MOST = 0.1
"""Largest error of a summed profile, relative to the norm of the wanted profile. If the error is larger, the average is
refused."""

RIDGE = 1e-10
"""Ridge of the linear system for profiles of norm 1. It is needed because profiles of nearby steps are almost the same,
and float32 has 24 bits."""


@dataclass(frozen=True)
class Profile:
    """The profile of the average at `step` of width sigma_rel, which is in `folder` by its `name`. shares: number of
    files that hold it; 0 if it is one file of full tensors."""

    step: int
    sigma_rel: float
    folder: Path
    name: str
    shares: int = 0


def inner(t: Tensor, gamma: Tensor, u: Tensor, delta: Tensor) -> Tensor:
    """Returns the integral of the product of the profiles (t, gamma) and (u, delta) (eq. 151), elementwise. t, u:
    steps, from 1. All tensors are float64."""
    early, late = torch.minimum(t, u), torch.maximum(t, u)
    power_of_later = torch.where(t < u, delta, gamma)
    return (gamma + 1) * (delta + 1) / (gamma + delta + 1) * (early / late) ** power_of_later / late


def mixture(steps: Sequence[int], widths: Sequence[float], step: int, width: float) -> tuple[Tensor, float]:
    """Returns coefficients (N,) float64, and the relative error in the L2 norm of the resulting profile. With these
    coefficients, the sum of the averages at `steps` of `widths` comes nearest to the average at `step` of `width`
    (Algorithm 3).

    The coefficients sum to 1, so weights that never change are reproduced exactly. Without this constraint the errors
    of averages are far larger, since weights move little from where they began."""
    t = torch.tensor(steps, dtype=torch.float64)
    gamma = torch.tensor([power_of(w) for w in widths], dtype=torch.float64)
    t0, gamma0 = torch.tensor(float(step), dtype=torch.float64), torch.tensor(power_of(width), dtype=torch.float64)
    norm = inner(t, gamma, t, gamma).sqrt()
    norm0 = inner(t0, gamma0, t0, gamma0).sqrt()
    products = inner(t[:, None], gamma[:, None], t, gamma) / norm / norm[:, None]
    wanted, sums = inner(t, gamma, t0, gamma0) / norm / norm0, norm0 / norm
    solved = torch.linalg.solve(
        products + RIDGE * torch.eye(len(t), dtype=torch.float64), torch.stack([wanted, sums], dim=1)
    )
    x = solved[:, 0] + solved[:, 1] * (1 - sums @ solved[:, 0]) / (sums @ solved[:, 1])
    error = (1 - 2 * wanted @ x + x @ products @ x).clamp(min=0).sqrt()
    return x * sums, float(error)


def write_snapshot(run_dir: Path, ranks: Ranks, step: int, sigma_rel: float, average: State) -> None:
    """Writes a snapshot of one average. A collective; rank 0 writes. Raises WorkFailed on all ranks if it cannot."""
    path = run_dir / "ema" / f"step-{step:08d}-{sigma_rel}.safetensors"
    error: OSError | SafetensorError | None = None
    if ranks.is_main:
        try:
            path.parent.mkdir(exist_ok=True)
            write_whole(average, path, {"step": str(step), "sigma_rel": str(sigma_rel)})
        except (OSError, SafetensorError) as caught:
            error = caught
    if ranks.any(error is not None):
        raise WorkFailed(f"cannot write the snapshot {path} ({error or 'rank 0 failed'})")


def reconstructed(
    run_dir: Path, config: AnyEMA, checkpoint: Path, state: TrainState, sigma_rel: float
) -> tuple[State, str]:
    """Returns the average of this width at a checkpoint, as full float32 tensors, and a description for people of how
    it was computed. state: of the checkpoint.

    It is computed from the snapshots before the checkpoint and the averages in it. Raises UserError if there are no
    snapshots, or if they do not reach this width."""
    option = f"--ema-sigma-rel {sigma_rel:g}"
    if not 0 < sigma_rel < WIDEST:
        raise UserError(f"{option}: must be above 0 and below {WIDEST}", field="--ema-sigma-rel", code="invalid")
    if not isinstance(config, PowerEMA) or config.snapshots is None:
        raise UserError(
            f"{option}: {run_dir} has no snapshots, only an average by {config}: train with "
            "ema.snapshots.every, such as 500",
            field="--ema-sigma-rel",
            code="not_found",
        )
    step = state.step
    profiles = [p for p in _snapshots(run_dir) if p.step < step]
    profiles += [Profile(step, width, checkpoint, name, state.shares) for name, width in config.widths().items()]
    steps, widths = [p.step for p in profiles], [p.sigma_rel for p in profiles]
    coefficients, error = mixture(steps, widths, step, sigma_rel)
    sources = f"{len(profiles)} averages up to step {step}"
    if error > MOST:
        grid = sorted({*torch.linspace(0.01, 0.27, 27).tolist(), *config.widths().values()})
        reached = [w for w in grid if mixture(steps, widths, step, w)[1] <= MOST]
        raise UserError(
            f"{option}: the {sources} in {run_dir} reproduce its profile with an error of {error:.0%}, above "
            f"{MOST:.0%}; they reach {min(reached):.2g} to {max(reached):.2g}; a smaller ema.snapshots.every "
            "extends this range",
            field="--ema-sigma-rel",
            code="invalid",
        )
    average = _sum({p: float(c) for p, c in zip(profiles, coefficients, strict=True)})
    return (
        average,
        f"a power function of sigma_rel {sigma_rel:g}, put together from {sources}; error of its profile {error:.2g}",
    )


def _snapshots(run_dir: Path) -> list[Profile]:
    """Returns the profiles of the snapshots, in the order of steps. Raises UserError for a file that is not a
    snapshot."""
    profiles: list[Profile] = []
    for file in sorted((run_dir / "ema").glob("step-*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            profiles.append(Profile(int(metadata["step"]), float(metadata["sigma_rel"]), file.parent, file.stem))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file}: not a snapshot ({error}): move it away to continue without it", field=file, code="unreadable"
            ) from None
    return profiles


def _sum(coefficients: Mapping[Profile, float]) -> State:
    """Returns the weighted sum of averages, added in float64. All must have the same tensors."""
    total: State = {}
    for profile, coefficient in coefficients.items():
        tensors = read_tensors(profile.folder, profile.name, profile.shares)
        if total and total.keys() != tensors.keys():
            file, first = (p.folder / f"{p.name}.safetensors" for p in (profile, next(iter(coefficients))))
            raise UserError(
                f"{file}: its parameters differ from those of {first}: move it away",
                field=file,
                code="mismatch",
            )
        for name, value in tensors.items():
            total[name] = total.get(name, torch.zeros(())) + coefficient * value.double()
    return {name: value.float() for name, value in total.items()}
