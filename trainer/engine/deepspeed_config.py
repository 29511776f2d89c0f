"""The configuration of DeepSpeed, merged from the run's configuration and a DeepSpeed JSON file (`engine.deepspeed`).

The file may repeat the value of a field of the configuration, or set "auto" as Hugging Face's trainer does. It may not
contradict the field. So each number has one place, and the file adds settings for which there is no field.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ambient_core.errors import UserError
from ambient_core.parsing import flatten, merge, read_mapping
from data_pipeline.loading.config import Layout
from trainer.engine.config import EngineConfig, OptimizerConfig, Precision

MERGED = (
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "comms_logger",
    "flops_profiler",
    "wall_clock_breakdown",
    "memory_breakdown",
    "steps_per_print",
    "dump_state",
    "tensorboard",
    "csv_monitor",
    "wandb",
)
"""Keys that are passed from the file to DeepSpeed unchanged. DeepSpeed ignores names that it does not know, so other
keys are refused."""

ELSEWHERE = (
    "ratio",
    "super_offload",
    "zenflow",
    "nvme_path",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "mics_shard_size",
)
"""Parts of zero_optimization that keep weights or Adam's moments in places where checkpoints do not look for them."""

UNUSED = ("fp16.", "bf16.", "torch_autocast.")
"""Sections whose `enabled` is decided by engine.precision. Their other keys have no effect, since training uses
autocast."""


@dataclass(frozen=True)
class Owned:
    """A DeepSpeed key that a field of the configuration decides. field: the field's name. says: the field's value, as
    shown in messages. value: the only value that the file may have; None allows any value."""

    field: str
    says: Any
    value: Any


def resolve_precision(wanted: Precision) -> Precision:
    """Returns the precision, with `auto` replaced by the choice for this machine."""
    if wanted != "auto":
        return wanted
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = getattr(torch.cpu, "get_capabilities", dict[str, bool])()
        native = known.get("avx512_bf16", False) or known.get("amx_bf16", False)
    return "bf16" if native else "fp32"


def settings(
    config: EngineConfig, optimizer: OptimizerConfig, layout: Layout, precision: Precision
) -> tuple[dict[str, Any], list[str]]:
    """Returns the settings for deepspeed.initialize, and the keys of the file that have no effect. precision: `auto` if
    another machine will train. Raises UserError, which names the file and the key."""
    own = _own_settings(config, optimizer, layout, precision)
    if config.deepspeed is None:
        return own, []
    where = f"engine.deepspeed: {config.deepspeed}"
    given = _without_auto(read_mapping(Path(config.deepspeed), "JSON", where))
    owned = _owned(config, optimizer, layout, precision)
    unused: list[str] = []
    for name, value in flatten(given):
        top, _, inner = name.partition(".")
        if (owner := owned.get(name)) is not None:
            if owner.value is not None and not _equal(value, owner.value):
                raise UserError(
                    f"{where}: {name} {json.dumps(value)}: the config says {owner.field} {owner.says}; make "
                    "them the same, or remove it from the file",
                    field=name,
                    code="conflict",
                )
        elif name.startswith(UNUSED):
            unused.append(name)
        elif top in ("optimizer", "scheduler"):
            raise UserError(
                f"{where}: {name} {json.dumps(value)}: the config's optimizer.* decides this; remove it from the file",
                field=name,
                code="conflict",
            )
        elif name == "zero_optimization":
            raise UserError(f"{where}: {name}: must be a mapping", field=name, code="invalid")
        elif top not in MERGED:
            raise UserError(
                f"{where}: {name}: cannot be merged; the keys that can be are {', '.join(MERGED)}",
                field=name,
                code="unsupported",
            )
        elif top == "zero_optimization" and (held := set(inner.split(".")) & {*ELSEWHERE}):
            raise UserError(
                f"{where}: {name}: checkpoints cannot hold the state of {held.pop()}; remove it from the file",
                field=name,
                code="unsupported",
            )
    kept = {name: value for name, value in given.items() if name in MERGED}
    return merge(own, kept), unused


def _own_settings(
    config: EngineConfig, optimizer: OptimizerConfig, layout: Layout, precision: Precision
) -> dict[str, Any]:
    """Returns the settings that follow from the run's configuration."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": layout.batch_size,
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": optimizer.clip if config.zero_stage else 0.0,
        "zero_optimization": zero,
        # A plain torch optimizer: DeepSpeed's own would compile for a minute at the first start.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": precision in ("bf16", "fp16"),
            "dtype": "float16" if precision == "fp16" else "bfloat16",
        },
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # on by default, it waits for the device at each pass and step
    }


def _owned(config: EngineConfig, optimizer: OptimizerConfig, layout: Layout, precision: Precision) -> dict[str, Owned]:
    def half(name: Precision) -> bool | None:
        return None if precision == "auto" else precision == name

    lr, warmup = optimizer.lr, optimizer.warmup_steps
    split = "micro_batch_size", f"{layout.micro_batch_size} of batch_size {layout.batch_size}"
    return {
        "train_batch_size": Owned("batch_size", layout.batch_size, layout.batch_size),
        "train_micro_batch_size_per_gpu": Owned(*split, layout.micro_batch_size),
        "gradient_accumulation_steps": Owned(*split, layout.accumulation),
        "gradient_clipping": Owned("optimizer.clip", optimizer.clip, optimizer.clip),
        "zero_optimization.stage": Owned("engine.zero_stage", config.zero_stage, config.zero_stage),
        "zero_optimization.offload_optimizer.device": Owned(
            "engine.offload_optimizer", config.offload_optimizer, "cpu" if config.offload_optimizer else "none"
        ),
        "zero_optimization.offload_param.device": Owned(
            "engine.offload_parameters", config.offload_parameters, "cpu" if config.offload_parameters else "none"
        ),
        "zero_allow_untested_optimizer": Owned("engine.adam", config.adam, True),
        "zero_force_ds_cpu_optimizer": Owned("engine.adam", config.adam, False),
        "fp16.enabled": Owned("engine.precision", precision, half("fp16")),
        "bf16.enabled": Owned("engine.precision", precision, half("bf16")),
        "torch_autocast.enabled": Owned(
            "engine.precision", precision, None if precision == "auto" else precision != "fp32"
        ),
        "optimizer.type": Owned("optimizer.lr and its other fields, for", "AdamW", "AdamW"),
        "optimizer.params.lr": Owned("optimizer.lr", lr, lr),
        "optimizer.params.betas": Owned("optimizer.betas", list(optimizer.betas), list(optimizer.betas)),
        "optimizer.params.eps": Owned("optimizer.eps", optimizer.eps, optimizer.eps),
        "optimizer.params.weight_decay": Owned(
            "optimizer.weight_decay", optimizer.weight_decay, optimizer.weight_decay
        ),
        "scheduler.type": Owned("optimizer.warmup_steps, for", "WarmupLR", "WarmupLR"),
        "scheduler.params.warmup_type": Owned("optimizer.warmup_steps, which is", "linear", "linear"),
        "scheduler.params.warmup_max_lr": Owned("optimizer.lr", lr, lr),
        "scheduler.params.warmup_num_steps": Owned("optimizer.warmup_steps", warmup, warmup),
    }


def _equal(a: Any, b: Any) -> bool:
    """Whether two values are equal. Here True differs from 1, but 1 equals 1.0."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _without_auto(data: dict[str, Any]) -> dict[str, Any]:
    inner = {name: _without_auto(value) if isinstance(value, dict) else value for name, value in data.items()}
    return {name: value for name, value in inner.items() if value not in ("auto", {})}
