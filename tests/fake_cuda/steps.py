"""Training steps and samplers on a fake CUDA device: `python -m tests.fake_cuda.steps GUARD`.

Prints a line of JSON for each case: its name, the error or null, and where the host waited in the second step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.fake_cuda import device
from tests.small_unet import FEWER

if __name__ == "__main__":
    device.load(Path(sys.argv[1]))

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

if __name__ == "__main__":
    device.pretend()  # after the packages that look at the device when they are imported

from ambient_core.batch import Batch
from data_pipeline.loading.config import Layout
from trainer.diffusion import levels, process
from trainer.diffusion.ambient import AmbientConfig, AmbientLoss
from trainer.diffusion.consistency import ConsistencyConfig, ConsistencyLoss
from trainer.diffusion.denoiser import Denoiser
from trainer.diffusion.noise import AddressedNoise
from trainer.diffusion.particles import ParticlePool
from trainer.diffusion.sampling import guided, sample
from trainer.engine.distributed import Ranks
from trainer.engine.ema import EMA, PowerEMA
from trainer.models import tiny_sdxl
from trainer.models.conditioning import Conditioner, TrainingConditioning
from trainer.models.dit import DiTConfig
from trainer.models.sdxl.adapter import SDXLConfig
from trainer.models.sdxl.conditioning import SDXLConditioning, TextRows
from trainer.models.sdxl.encoded_text import EncodedText
from trainer.models.sdxl.lora import LoraConfig
from trainer.models.unet2d import UNet2DConfig
from trainer.monitor.metrics import Meter
from trainer.training.step import step_loss

ROWS, STRIDE, TOKENS = 4, 2, 77
CUDA = torch.device("cuda", 0)
Shape = tuple[int, int, int]


def network(kind: str) -> tuple[nn.Module, Shape]:
    """A tiny backbone of a kind: unet2d, dit, or sdxl, sdxl-checkpointed, sdxl-encoded with adapters."""
    if kind == "unet2d":
        return UNet2DConfig((16,), 1, (0,), 16).adapter.backbone((1, 16, 16)), (1, 16, 16)
    if kind == "dit":
        return DiTConfig(1, 2, 2, 16).adapter.backbone((1, 16, 16)), (1, 16, 16)
    unet: Any = UNet2DConditionModel(**tiny_sdxl.UNET | FEWER)
    unet.to(torch.bfloat16).requires_grad_(False)
    encoded = kind == "sdxl-encoded"
    settings = {"checkpointed": {"activation_checkpointing": True}, "encoded": {"text": "encoded", "prompt": "a disc"}}
    lora = LoraConfig(4, text_encoders=encoded)
    config = SDXLConfig("nowhere", lora=lora, **settings.get(kind.removeprefix("sdxl-"), {}))
    text = None
    if encoded:
        common = {**tiny_sdxl.TEXT, "vocab_size": 100}
        first, second = (
            CLIPTextConfig(
                hidden_size=width,
                intermediate_size=2 * width,
                projection_dim=tiny_sdxl.PROJECTION,
                num_attention_heads=2,
                **common,
            )
            for width in tiny_sdxl.WIDTHS
        )
        text = EncodedText(CLIPTextModel(first), CLIPTextModelWithProjection(second)).requires_grad_(False)
    return config.adapter._adapted(unet, text), (4, 8, 8)


class Captions:
    """More captions than are kept on the device: a cache on disk, without the disk."""

    def rows(self, ids: Any) -> tuple[torch.Tensor, torch.Tensor]:
        width, ids = sum(tiny_sdxl.WIDTHS), list(ids)
        return torch.zeros(len(ids), TOKENS, width).half(), torch.zeros(len(ids), tiny_sdxl.PROJECTION).half()


def conditioning(kind: str, backbone: Any, many: bool) -> tuple[TrainingConditioning, Conditioner, dict[str, Any]]:
    """What a kind is given: the object, the conditioner, and a batch's conditioning."""
    if not kind.startswith("sdxl"):
        return TrainingConditioning(), Conditioner(), {}
    encoded = kind == "sdxl-encoded"
    given = SDXLConditioning("nowhere", None, encoded, 0.1, data=None, seed=0, device=CUDA)  # pyright: ignore[reportArgumentType]
    if not encoded:
        backbone.text = rows = TextRows(Captions().rows(range(3)))
        if many:
            rows._kept, rows._cache = None, Captions()  # pyright: ignore[reportAttributeAccessIssue]
        given.__dict__["_rows"] = rows
    shape = (2, TOKENS) if encoded else ()
    captions = torch.zeros(ROWS, *shape, dtype=torch.int64, device=CUDA)
    none = torch.zeros(shape, dtype=torch.int64, device=CUDA)
    batch = {"time_ids": torch.zeros(ROWS, tiny_sdxl.TIME_IDS, device=CUDA), "caption": captions}
    return given, Conditioner(("time_ids", "caption"), none, None, 0.1), batch


def steps(
    kind: str,
    noise: process.AnyProcess,
    level: Any,
    weight: Any,
    autocast: torch.dtype | None = None,
    many: bool = False,
    pairs: bool = False,
    where: Any = "below",
) -> None:
    """Two whole steps with consistency: losses, backward, clipping, AdamW, averages. Waits are those of the second."""
    torch.manual_seed(0)
    backbone, shape = network(kind)
    noise.time(torch.ones(1))  # fills its table with numbers
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = Denoiser(device.on_device(backbone), noise, "eps")
        given, conditioner, caption = conditioning(kind, backbone, many)
        down = 2 if where == "everywhere" else 1
        consistency = ConsistencyConfig(period=1, start=0, steps=down, gradient="both", where=where)

        def engine(*inputs: Any) -> torch.Tensor:
            with torch.autocast("cuda", autocast, enabled=autocast is not None):
                return denoiser(*inputs)

        highest = noise.sigma_max if where == "everywhere" else None
        run: Any = SimpleNamespace(
            config=SimpleNamespace(seed=0, consistency=consistency),
            layout=Layout(ROWS, ROWS, 0, 1),
            denoiser=denoiser,
            engine=engine,
            stride=STRIDE,
            conditioning=given,
            conditioner=conditioner,
            schedule=consistency.schedule(),
            pool=ParticlePool(ROWS // STRIDE, 4, noise.sigma_min, highest),
            ambient=AmbientLoss(level, weight, noise, AmbientConfig(boundary_share=0.3, pairs=pairs)),
            consistency=ConsistencyLoss(weight, noise.sigma_min, 0.7, down, "both"),
        )
        batch = Batch(torch.zeros(ROWS, *shape, device=CUDA), torch.full((ROWS,), 0.2, device=CUDA), caption)
        with device.waits():
            meter = Meter(Ranks(0, 1, CUDA))
            trained = [p for p in denoiser.parameters() if p.requires_grad]
            ema = EMA(PowerEMA(), [p.data for p in trained])
            optimizer: Any = torch.optim.AdamW(trained, fused=True)
            for step in range(2):
                device.WAITS.clear()
                step_loss(run, batch, step, step, 0, meter).backward()
                norm = nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.found_inf = (~norm.isfinite()).float()
                optimizer.step()
                ema.update([p.data for p in trained], step + 1)
                assert all(p.grad is not None and p.grad.device == CUDA for p in trained)
                optimizer.zero_grad()


def samples(method: Any) -> None:
    """Four levels of a sampler with guidance."""
    torch.manual_seed(0)
    backbone, shape = network("unet2d")
    with FakeTensorMode(allow_non_fake_inputs=True):
        denoiser = Denoiser(device.on_device(backbone), process.VE(), "eps")
        with device.waits():
            x = AddressedNoise(0, -1, 0).normal("sample.start", torch.empty(ROWS, *shape, device=CUDA))
            down = levels.karras_levels(3, 80.0, 0.002)
            device.WAITS.clear()
            drawn = sample(guided(denoiser, denoiser, 1.5), x, down, {}, method, lambda i: AddressedNoise(0, i, 0))
            assert drawn.device == CUDA


def numbers_of_the_table() -> None:
    """VPTable reads its limits from a table, whose values FakeTensorMode hides. It does so once, on the CPU."""
    kind: Any = process.VPTable
    low, high = kind().sigma_min, kind().sigma_max
    kind.sigma_min, kind.sigma_max = property(lambda self: low), property(lambda self: high)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    def case(name: str, *words: Any, **options: Any) -> tuple[str, Callable[[], None]]:
        return name, lambda: steps(*words, **options)

    normal, edm, bf16 = levels.LogNormal(), levels.EDM(), torch.bfloat16
    yield case("unet2d ve", "unet2d", process.VE(), normal, edm)
    yield case("unet2d vp_table", "unet2d", process.VPTable(), levels.UniformTime(), levels.MinSNR())
    yield case("unet2d vp_cosine", "unet2d", process.VPCosine(), levels.LogUniform(), levels.Uniform())
    yield case("unet2d flow fp16", "unet2d", process.Flow(), normal, levels.SoftMinSNR(), torch.float16)
    yield case("unet2d pairs bf16", "unet2d", process.VE(), normal, edm, bf16, pairs=True)
    yield case("unet2d everywhere", "unet2d", process.VE(), normal, edm, where="everywhere")
    yield case("dit", "dit", process.Flow(), normal, levels.SoftMinSNR())
    yield case("dit bf16", "dit", process.Flow(), normal, levels.SoftMinSNR(), bf16)
    sdxl = process.VPTable(), levels.UniformTime(), levels.MinSNR()
    yield case("sdxl fp32", "sdxl", *sdxl)
    yield case("sdxl many captions bf16", "sdxl", *sdxl, bf16, many=True)
    yield case("sdxl checkpointed bf16", "sdxl-checkpointed", *sdxl, bf16)
    yield case("sdxl encoded captions bf16", "sdxl-encoded", *sdxl, bf16)
    for method in ("ancestral", "ddim", "heun", "dpmpp_2m"):
        yield f"sample {method}", lambda method=method: samples(method)


def main() -> None:
    numbers_of_the_table()
    for name, work in cases():
        device.WAITS.clear()
        error: str | None = None
        try:
            work()
        except Exception as raised:
            trace = raised.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            line = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else ""
            error = f"{type(raised).__name__}: {' '.join(str(raised).split())[:300]} at {line}"
        print(json.dumps({"case": name, "error": error, "waits": dict(device.WAITS)}), flush=True)


if __name__ == "__main__":
    main()
