"""Training loops as people usually write them, with which ours is compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ambient_core.batch import Batch
from trainer.diffusion.noise import StreamNoise
from trainer.training.run import Run


class Bare:
    """The arithmetic of a run in a plain PyTorch loop: its losses on its network, fused AdamW, clipping, an average
    of the weights. Batches are in memory, and noise comes from one generator. Nothing is logged, checked or saved."""

    def __init__(self, run: Run, module: nn.Module | None = None) -> None:
        """module: used instead of the run's denoiser, such as the denoiser wrapped in DistributedDataParallel."""
        self.run, self.module, self.step = run, module or run.denoiser, 0
        self._weights: list[Tensor] = [p for p in run.denoiser.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._weights, run.config.optimizer.lr, fused=True)
        self._averages = {name: [p.detach().clone() for p in self._weights] for name in run.ema.averages}
        self._noise = StreamNoise(torch.Generator().manual_seed(0))
        stream = run.loader.stream(0)
        self._batches = [next(stream) for _ in range(16)]
        stream.close()

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self._one(self._batches[self.step % len(self._batches)])
            self.step += 1

    def _one(self, batch: Batch) -> None:
        self._loss(batch).backward()
        nn.utils.clip_grad_norm_(self._weights, self.run.config.optimizer.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for name, beta in self.run.ema.config.betas(self.step + 1).items():
                torch._foreach_lerp_(self._averages[name], self._weights, 1 - beta)

    def _loss(self, batch: Batch) -> Tensor:
        run, c = self.run, self.run.config.consistency
        batch = run.conditioner(batch, self._noise)
        loss = run.ambient(self.module, batch, self._noise).loss.mean()
        if run.consistency and c and run.schedule.has_consistency(self.step):
            slots, particles = run.pool.take(batch, self._noise)
            terms, children = run.consistency(self.module, particles, self._noise)
            run.pool.put(slots, children)
            loss = loss + c.weight * run.schedule.scale * terms.loss.mean()
        return loss


class Unconditional:
    """The loop of diffusers' examples/unconditional_image_generation, reimplemented: accelerate, a DataLoader, DDPM's
    loss, an EMAModel."""

    def __init__(self, network: Any, images: Tensor, batch_size: int, rate: float) -> None:
        """network: a UNet2DModel. images: (N, C, H, W)."""
        from accelerate import Accelerator
        from diffusers.optimization import get_scheduler
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
        from diffusers.training_utils import EMAModel

        self._accelerator = Accelerator(cpu=True, mixed_precision="no")
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
        data = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(images), batch_size, shuffle=True, drop_last=True
        )
        schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10_000)
        self._model, self._optimizer, self._data, self._schedule = self._accelerator.prepare(
            network, optimizer, data, schedule
        )
        self._noises: Any = DDPMScheduler(num_train_timesteps=1000)
        self._average = EMAModel(self._model.parameters(), decay=0.9999, use_ema_warmup=True)
        self._batches = iter(self._data)
        self.shown = 0.0

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            try:
                (clean,) = next(self._batches)
            except StopIteration:
                self._batches = iter(self._data)
                (clean,) = next(self._batches)
            self._one(clean)

    def _one(self, clean: Tensor) -> None:
        noise = torch.randn(clean.shape)
        times = torch.randint(0, 1000, (len(clean),))
        with self._accelerator.accumulate(self._model):
            output = self._model(self._noises.add_noise(clean, noise, times), times).sample
            loss = nn.functional.mse_loss(output.float(), noise.float())
            self._accelerator.backward(loss)
            if self._accelerator.sync_gradients:
                self._accelerator.clip_grad_norm_(self._model.parameters(), 1.0)
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad()
        self._average.step(self._model.parameters())
        self.shown = loss.detach().item()


class TextToImage:
    """The LoRA loop for SDXL of diffusers' examples/text_to_image, reimplemented: at each step the VAE encodes the
    pixels and both text encoders the captions; adapters are on the projections of the attention."""

    def __init__(
        self, base: str, network: nn.Module, pictures: Tensor, captions: list[str], batch_size: int, rate: float
    ) -> None:
        """network: the UNet with its adapters. pictures: (N, 3, H, W) in [-1, 1]."""
        from accelerate import Accelerator
        from diffusers import AutoencoderKL, DDPMScheduler  # pyright: ignore[reportPrivateImportUsage]

        from data_pipeline.latents.text import TextEncoders

        self._accelerator = Accelerator(cpu=True, mixed_precision="no")
        self._vae: Any = AutoencoderKL.from_pretrained(base, subfolder="vae").requires_grad_(False)
        self._encoders = TextEncoders(base, torch.device("cpu"))
        self._noises: Any = DDPMScheduler(num_train_timesteps=1000)
        weights = [p for p in network.parameters() if p.requires_grad]
        self._network: Any = network
        self._weights, self._batch_size, self._captions = weights, batch_size, captions
        self._optimizer = self._accelerator.prepare(torch.optim.AdamW(weights, lr=rate))
        self._pictures, self._at, self.shown = pictures, 0, 0.0

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            rows = [(self._at + i) % len(self._pictures) for i in range(self._batch_size)]
            self._at += self._batch_size
            self._one(self._pictures[rows], [self._captions[row] for row in rows])

    def _one(self, pictures: Tensor, captions: list[str]) -> None:
        with torch.no_grad():
            latents = self._vae.encode(pictures).latent_dist.sample() * self._vae.config.scaling_factor
        noise, times = torch.randn_like(latents), torch.randint(0, 1000, (len(latents),))
        noisy = self._noises.add_noise(latents, noise, times)
        text, _ = self._encoders.embed(captions)
        side = float(pictures.shape[-1])
        sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]]).expand(len(latents), 6)
        added = {"text_embeds": text.pooled.float(), "time_ids": sizes}
        output = self._network(noisy, times, text.prompt_embeds.float(), added_cond_kwargs=added).sample
        loss = nn.functional.mse_loss(output.float(), noise.float())
        self._accelerator.backward(loss)
        self._accelerator.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.shown = loss.detach().item()
