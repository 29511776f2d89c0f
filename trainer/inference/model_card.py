"""The README.md of an export: what the model was trained on and how, and how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from ambient_core.parsing import json_lines
from trainer.config.run_config import RunConfig, to_yaml
from trainer.diffusion.process import AnyProcess
from trainer.inference.load import Restored, shards_of
from trainer.models.adapter import Card


def card(run: Restored, run_dir: Path) -> str:
    """Returns the card in Markdown, with the header that the hub reads."""
    config = run.config
    its = config.model.adapter.card(run.state.shape)
    tags = ["ambient-trainer", "arxiv:2404.10177", *its.tags]
    head: dict[str, Any] = {"library_name": its.library, "tags": tags, **its.head}
    metrics = _metrics(run_dir, run.state.step)
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False).strip(),
            "---",
            "",
            f"# {run_dir.resolve().name}",
            "",
            (
                'A diffusion model trained from noisy images by ambient-trainer, after "Consistent Diffusion Meets '
                'Tweedie" (arXiv 2404.10177). These are the averaged weights.'
            ),
            "",
            "## Use",
            "",
            "```python",
            _code(config, its),
            "```",
            "",
            "## Data",
            "",
            *_data(config),
            "",
            "## Training",
            "",
            *_training(run),
            "",
            "## Metrics",
            "",
            *(
                [
                    "| | at the last report |",
                    "|---|---|",
                    *(f"| {name} | {value:.5g} |" for name, value in sorted(metrics.items())),
                ]
                if metrics
                else ["None were recorded."]
            ),
            "",
            "## Configuration",
            "",
            "```yaml",
            to_yaml(config).strip(),
            "```",
            "",
            "## Licence",
            "",
            (
                "Fill this in before you publish the model: the licence of the images and, if there is a base model, "
                "its licence apply to it."
            ),
            "",
        ]
    )


def _code(config: RunConfig, its: Card) -> str:
    if its.output is None:
        return its.code
    return f"""import numpy
import torch
{its.code}


def h(x, sigma):
    \"\"\"E[x0 | x], where x = x0 + sigma z and x0 is in [-1, 1]. x: (B, C, H, W); sigma: (B,).\"\"\"
    time = {time_code(config.process)}
    sigma = sigma.reshape(-1, 1, 1, 1)
    out = {its.output.format(x=f"x * {scale_code(config.process)}")}
    return {OUTPUTS[config.prediction]}"""


OUTPUTS = {
    "eps": "x - sigma * out",
    "x0": "out",
    "v": "x / (1 + sigma**2) - sigma / (1 + sigma**2) ** 0.5 * out",
    "flow": "(x - sigma * out) / (1 + sigma)",
}
"""Expressions for h by prediction, as in trainer/diffusion/prediction.py."""


def scale_code(process: AnyProcess) -> str:
    if process.kind == "ve":
        return f"(sigma**2 + {process.sigma_data}**2) ** -0.5"
    return "1 / (1 + sigma)" if process.kind == "flow" else "(sigma**2 + 1) ** -0.5"


def time_code(process: AnyProcess) -> str:
    """Returns an expression in sigma, as in trainer/diffusion/process.py."""
    if process.kind == "ve":
        return (
            f"1000 * torch.log(sigma / {process.sigma_min}) / torch.log(torch.tensor({process.sigma_max} / "
            f"{process.sigma_min}))"
        )
    if process.kind == "flow":
        return "1000 * sigma / (1 + sigma)"
    if process.kind == "vp_cosine":
        angle = (
            f"torch.acos(torch.cos(torch.tensor({process.offset / (1 + process.offset)} * torch.pi / 2)) * "
            "(sigma**2 + 1) ** -0.5)"
        )
        return f"1000 * ({angle} * 2 / torch.pi * {1 + process.offset} - {process.offset})"
    beta = (
        f"torch.linspace({process.beta_start}**0.5, {process.beta_end}**0.5, {process.steps}, dtype=torch.float64) ** 2"
    )
    table = f"(1 / (1 - {beta}).cumprod(0) - 1).log() / 2"
    return f"torch.from_numpy(numpy.interp(sigma.log().numpy(), {table}, range({process.steps}))).float()"


def _data(config: RunConfig) -> list[str]:
    index = shards_of(config)
    if index is None:
        return [f"Shards at `{config.data.shards}`, which did not exist any more when this was written."]
    corruption = json.dumps(index.request.get("corruption"))
    levels = (
        f"sigma_n {index.sigma_min:g} to {index.sigma_max:g}, in units of "
        f"{'scaled latents' if index.request.get('latents') else 'pixels in [-1, 1]'}"
    )
    scaled = "" if config.data.sigma_scale == 1 else f" (treated as {config.data.sigma_scale:g} times that)"
    return [
        f"- {index.samples} observations of shape {list(index.shape)}, of `{index.request.get('source')}`",
        f"- {levels}{scaled}; corruption `{corruption}`",
        f"- checksum of the shards: `{index.checksum}`",
    ]


def _training(run: Restored) -> list[str]:
    config, state, c = run.config, run.state, run.config.consistency
    consistency = "none"
    if c is not None:
        period = state.period or c.schedule().scale
        consistency = f"in 1 of {period:g} steps from {c.start} on, weight {c.weight:g}, gradient {c.gradient}"
    return [
        (
            f"- {state.step} steps of {config.batch_size} samples; {state.evaluations} network evaluations; "
            f"{state.seconds:.0f} s"
        ),
        (
            f"- noise process `{config.process.kind}`, prediction `{config.prediction}`, levels "
            f"`{config.levels.kind}`, weight `{config.weight.kind}`"
        ),
        (
            "- ambient loss: "
            f"{'pairs, an unbiased estimate of the clean loss' if config.ambient.pairs else 'single observations'}"
        ),
        f"- consistency: {consistency}",
        f"- weights averaged by {run.average}",
    ]


def _metrics(run_dir: Path, step: int) -> dict[str, float]:
    """Returns the last reported value of each loss up to this step."""
    found = dict[str, float]()
    for record in json_lines(run_dir / "metrics.jsonl"):
        metrics = record.get("metrics", {}) if record["step"] <= step else {}
        found |= {name: value for name, value in metrics.items() if name.startswith(("loss/", "consistency/"))}
    return found
