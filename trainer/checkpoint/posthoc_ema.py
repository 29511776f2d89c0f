"""Averages of the weights of any width, after training, from snapshots of others (Karras et al. 2024, arXiv 2312.02696,
sec. 3).

The profile of an average at step T is p(t) = (gamma + 1) t^gamma / T^(gamma + 1) from 0 to T: how much the weights of
each moment count. An update a step gives its integral over that step exactly. Averages that were kept can be summed to
one that was not as well as their profiles can be summed to its profile.

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
from trainer.checkpoint.tensors import State, read_tensors, write_whole
from trainer.engine.distributed import Ranks
from trainer.engine.ema import WIDEST, AnyEMA, PowerEMA, power_of

MOST = 0.1
"""The largest error of a summed profile, relative to the wanted one's norm; beyond it the average is refused."""

RIDGE = 1e-10
"""Of profiles of norm 1: profiles of steps that are near are almost the same, and float32 has 24 bits."""


@dataclass(frozen=True)
class Profile:
    """Of the average at `step`, of width sigma_rel, which the safetensors `file` holds."""

    step: int
    sigma_rel: float
    file: Path


def inner(t: Tensor, gamma: Tensor, u: Tensor, delta: Tensor) -> Tensor:
    """The integral of the product of the profiles (t, gamma) and (u, delta) (eq. 151), elementwise; float64, steps from
    1."""
    early, late = torch.minimum(t, u), torch.maximum(t, u)
    of_the_later = torch.where(t < u, delta, gamma)
    return (gamma + 1) * (delta + 1) / (gamma + delta + 1) * (early / late) ** of_the_later / late


def mixture(steps: Sequence[int], widths: Sequence[float], step: int, width: float) -> tuple[Tensor, float]:
    """Coefficients (N,) float64, whose sum is 1, by which averages at `steps` of `widths` come nearest to the one at
    `step` of `width` (Algorithm 3), and the relative error in the L2 norm of its profile.

    Sums of 1 leave weights that stand still as they are; without that rule errors of averages are far larger, since
    weights move little on their way from where they began."""
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
    """A collective; rank 0 writes. Raises WorkFailed on all ranks where it cannot."""
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


def reconstructed(run_dir: Path, config: AnyEMA, checkpoint: Path, step: int, sigma_rel: float) -> tuple[State, str]:
    """The average of this width at a checkpoint, whole float32, and how it was come by, for people to read.

    From the snapshots up to the checkpoint, and the averages in it. Raises UserError where there are none, or where
    they do not reach this width."""
    asked = f"--ema-sigma-rel {sigma_rel:g}"
    if not 0 < sigma_rel < WIDEST:
        raise UserError(f"{asked}: must be above 0 and below {WIDEST}", field="--ema-sigma-rel", code="invalid")
    if not isinstance(config, PowerEMA) or config.snapshots is None:
        raise UserError(
            f"{asked}: {run_dir} kept no snapshots, only {config}: train with ema.snapshots.every, such as 500",
            field="--ema-sigma-rel",
            code="not_found",
        )
    profiles = [p for p in _snapshots(run_dir) if p.step < step]
    profiles += [Profile(step, width, checkpoint / f"{name}.safetensors") for name, width in config.widths().items()]
    steps, widths = [p.step for p in profiles], [p.sigma_rel for p in profiles]
    coefficients, error = mixture(steps, widths, step, sigma_rel)
    found = f"{len(profiles)} averages up to step {step}"
    if error > MOST:
        grid = sorted({*torch.linspace(0.01, 0.27, 27).tolist(), *config.widths().values()})
        reached = [w for w in grid if mixture(steps, widths, step, w)[1] <= MOST]
        raise UserError(
            f"{asked}: the {found} in {run_dir} give its profile with an error of {error:.0%}, above "
            f"{MOST:.0%}; they reach {min(reached):.2g} to {max(reached):.2g}; a smaller ema.snapshots.every "
            "reaches further",
            field="--ema-sigma-rel",
            code="invalid",
        )
    average = _sum({p.file: float(c) for p, c in zip(profiles, coefficients, strict=True)})
    return (
        average,
        f"a power function of sigma_rel {sigma_rel:g}, put together from {found}; error of its profile {error:.2g}",
    )


def _snapshots(run_dir: Path) -> list[Profile]:
    """In the order of steps. Raises UserError for a file that is not one."""
    found: list[Profile] = []
    for file in sorted((run_dir / "ema").glob("step-*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            found.append(Profile(int(metadata["step"]), float(metadata["sigma_rel"]), file))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file}: not a snapshot ({error}): move it away to continue without it", field=file, code="unreadable"
            ) from None
    return found


def _sum(coefficients: Mapping[Path, float]) -> State:
    """The weighted sum of files with the same tensors, added in float64."""
    total: State = {}
    for file, coefficient in coefficients.items():
        tensors = read_tensors(file.parent, file.stem)
        if total and total.keys() != tensors.keys():
            raise UserError(
                f"{file}: its parameters are not those of {next(iter(coefficients))}: move it away",
                field=file,
                code="mismatch",
            )
        for name, value in tensors.items():
            total[name] = total.get(name, torch.zeros(())) + coefficient * value.double()
    return {name: value.float() for name, value in total.items()}
