"""`python -m data_pipeline.inspect`: verifies a folder of shards, summarizes it, and shows some observations."""

from __future__ import annotations

import argparse
import hashlib
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ambient_core import errors, storage
from ambient_core.arguments import Parser
from ambient_core.errors import WorkFailed, one_line
from ambient_core.progress import progress_bar
from data_pipeline.corruption.corruption import ORIGIN
from data_pipeline.format import index as indices
from data_pipeline.format.index import REJECTED, Shard, ShardIndex
from data_pipeline.format.tar import Careful
from data_pipeline.format.writer import META, OBSERVATION
from data_pipeline.loading.reader import BadSample, meta, npy_array

SHOWN = 64
"""Number of observations on the contact sheet."""

EXAMPLE = """examples:
  python -m data_pipeline.inspect data/mine
  python -m data_pipeline.inspect s3://bucket/mine --no-verify --out pictures

The exit code is 1 if a shard is damaged. Each damaged shard is named, with what is wrong.
"""


@dataclass
class Contents:
    """What is read from the samples. levels: sigma_n of every sample. shown: (sigma_n, x_n as (C, H, W) float16) of the
    samples to be shown. origins: the number of samples for each origin of sigma_n. captions: the number of samples with
    a caption."""

    levels: list[float] = field(default_factory=list[float])
    shown: list[tuple[float, NDArray[np.float16]]] = field(default_factory=list[tuple[float, NDArray[np.float16]]])
    origins: Counter[str] = field(default_factory=Counter[str])
    captions: int = 0


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m data_pipeline.inspect",
        description=(
            "Verifies checksums and counts of a folder of shards, prints a summary, and writes contact-sheet.png "
            "and sigma-n.png."
        ),
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("output", metavar="OUTPUT", help="the folder or URL that data_pipeline.shard wrote")
    p.add_argument(
        "--no-verify",
        action="store_true",
        help=(
            "skip the checksums, so that only the observations that are shown are read; sizes and counts are still "
            "checked"
        ),
    )
    p.add_argument("--out", metavar="FOLDER", help="where to write the pictures (default: OUTPUT/inspect)")
    return p


def inspect(output: str, verify: bool = True) -> tuple[ShardIndex, Contents, list[str]]:
    """Returns the index, the contents of the samples, and one line per fault: the file's path and what is wrong.

    Raises UserError for a folder without a complete index.
    """
    path = storage.join(output, indices.NAME)
    if not storage.exists(path):
        indices.read_index(output)  # its error says whether the folder or the index is missing
    index = indices.parse_index(path, storage.read_bytes(path))
    contents, wrong = Contents(), _wrong_rejected(output, index)
    wanted = set(np.linspace(0, index.samples - 1, min(SHOWN, index.samples)).round().astype(int).tolist())
    first = 0
    with progress_bar(total=index.bytes, unit="B", unit_scale=True, desc=f"inspect {output}") as bar:
        for shard in index.shards:
            rows = {n - first for n in wanted if first <= n < first + shard.samples}
            file = storage.join(output, shard.name)
            wrong += [f"{file}: {what}" for what in _read(file, shard, index, rows, contents, verify)]
            first += shard.samples
            bar.update(shard.bytes)
    return index, contents, wrong


def _wrong_rejected(output: str, index: ShardIndex) -> list[str]:
    path = storage.join(output, REJECTED)
    lines = storage.read_bytes(path).count(b"\n") if storage.exists(path) else 0
    return [f"{path}: {lines} images, the index says {index.rejected}"] if lines != index.rejected else []


def _read(path: str, shard: Shard, index: ShardIndex, rows: set[int], contents: Contents, verify: bool) -> list[str]:
    """Adds the samples of a shard to `contents`. Returns what is wrong with the shard. rows: the numbers, within the
    shard, of the samples to be shown."""
    count, wrong = 0, list[str]()
    try:
        if (size := storage.size_of(path)) != shard.bytes:
            return [f"{size} bytes, the index says {shard.bytes}"]
        with _opened(path, verify) as file:
            if verify and (digest := _sha256(file)) != shard.sha256:
                wrong = [f"SHA-256 {digest[:12]}..., the index says {shard.sha256[:12]}..."]
            for key, members in _samples(file, rows):
                _add(key, members, index.shapes[shard.shape], contents)
                count += 1
    except FileNotFoundError:
        return ["missing"]
    except OSError as error:
        return [*wrong, f"cannot be read: {error.strerror}"]
    except (tarfile.TarError, ValueError) as error:
        return [*wrong, f"after {count} samples: {one_line(error)}"]
    return wrong if count == shard.samples else [*wrong, f"{count} samples, the index says {shard.samples}"]


def _opened(path: str, verify: bool) -> BinaryIO:
    """Opens a shard. A remote file is fetched completely if all of it will be read, otherwise in parts as they are
    read."""
    remote = storage.local_path(path) is None
    return BytesIO(storage.read_bytes(path)) if remote and verify else storage.open_binary(path)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while data := file.read(1 << 20):
        digest.update(data)
    file.seek(0)
    return digest.hexdigest()


def _samples(file: BinaryIO, rows: set[int]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields the key and the members of each sample. Observations are read only for the samples in `rows`; those of the
    other samples are empty."""
    key, members, row = "", dict[str, bytes](), 0
    with tarfile.open(fileobj=Careful(file), mode="r:") as tar:
        for member in tar:
            name, _, extension = member.name.partition(".")
            if name != key and members:
                yield key, members
                members, row = {}, row + 1
            if not member.isreg():
                raise ValueError(f"the member {member.name} is not a plain file")
            if member.size > storage.LARGEST:
                raise ValueError(f"the member {member.name} has {member.size} bytes")
            file.seek(member.offset_data)
            key, members[extension] = name, file.read(member.size) if extension == META or row in rows else b""
        if members:
            yield key, members


def _add(key: str, members: dict[str, bytes], shape: tuple[int, int, int], contents: Contents) -> None:
    """Adds a sample to `contents`. Raises ValueError, with the key, for a sample that does not agree with the index."""
    lacking = {OBSERVATION, META} - members.keys()
    if lacking:
        raise ValueError(f"sample {key}: has no member {key}.{min(lacking)}")
    try:  # as the loader reads them
        about = meta(members[META])
        sigma = float(about["sigma_n"])
        if members[OBSERVATION]:
            contents.shown.append((sigma, npy_array(members[OBSERVATION], shape)))
    except BadSample as error:
        raise ValueError(f"sample {key}: {error}") from None
    contents.levels.append(sigma)
    contents.origins[str(about.get(ORIGIN, "exact"))] += 1
    contents.captions += "caption" in about


def summary(index: ShardIndex, contents: Contents) -> str:
    levels = np.asarray(contents.levels)
    quantiles = np.quantile(levels, [0, 0.05, 0.5, 0.95, 1])
    spread = ", ".join(
        f"{name} {q:.4g}" for name, q in zip(("min", "5 %", "median", "95 %", "max"), quantiles, strict=True)
    )
    origins = ", ".join(f"{name} {count}" for name, count in contents.origins.most_common())
    corruption = index.request.get("corruption") or {}
    rows = {
        "samples": f"{index.samples} in {len(index.shards)} shards, {index.bytes / 1e6:.1f} MB",
        "shape": _shape(index),
        "source": index.request.get("source"),
        "corruption": ", ".join(f"{name} {value}" for name, value in corruption.items() if value is not None),
        "seed": index.request.get("seed"),
        "sigma_n": f"{spread}; clean (0): {int((levels == 0).sum())}",
        "its origin": origins,
        **_values(index, contents),
        "captions": _captions(index, contents),
        "rejected": f"{index.rejected}{f', see {REJECTED}' if index.rejected else ''}",
        "checksum": index.checksum,
    }
    return "\n".join(f"  {name:<12}{value}" for name, value in rows.items())


def _values(index: ShardIndex, contents: Contents) -> dict[str, str]:
    """Returns the rows about pixel values, which reveal a wrong --range or a noise level in other units."""
    if index.request.get("latents") or not contents.shown:
        return {}
    pixels = np.concatenate([x_n.astype(np.float32).ravel() for _, x_n in contents.shown])
    low, middle, high = np.quantile(pixels, [0.01, 0.5, 0.99])
    rows = {
        "values": (
            f"1 % {low:.3g}, median {middle:.3g}, 99 % {high:.3g} of {len(contents.shown)} observations; black is "
            "-1, white 1"
        )
    }
    if value_range := index.request.get("value_range"):
        half = (value_range[1] - value_range[0]) / 2
        rows["range"] = (
            f"{value_range[0]:g} is -1, {value_range[1]:g} is 1: sigma_n of {np.median(contents.levels) * half:.4g} in "
            "the files' own units"
        )
    return rows


def _shape(index: ShardIndex) -> str:
    latents = index.request.get("latents")
    if latents:
        counted = zip(index.shapes, index.samples_of, strict=True)
        shapes = ", ".join(f"{shape}: {count}" for shape, count in counted) if len(index.shapes) > 1 else index.shape
        return f"latents {shapes} by VAE {latents['vae'][:16]}, {latents['source']}; (channels, height, width), float16"
    return f"{' x '.join(map(str, index.shape))} (channels, height, width), float16"


def _captions(index: ShardIndex, contents: Contents) -> str:
    if not index.text:
        return f"{contents.captions} of {len(contents.levels)}"
    return (
        f"{contents.captions} of {len(contents.levels)}; {index.text['captions']} distinct ones, with the empty "
        f"one, by text encoders {index.text['identity'][:16]}"
    )


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    index, contents, wrong = inspect(args.output, verify=not args.no_verify)
    for line in wrong:
        print(f"damaged: {line}", file=sys.stderr)
    if wrong:
        raise WorkFailed(
            f"{args.output}: {len(wrong)} things are wrong, named above; restore the files from a copy, or "
            "shard again into a new OUTPUT"
        )
    print(f"{args.output}: complete, {'sizes and counts' if args.no_verify else 'checksums and counts'} are right")
    print(summary(index, contents))
    from data_pipeline.inspect_plots import contact_sheet, histogram

    folder = args.out or storage.join(args.output, "inspect")
    shown = len(contents.shown)
    some = (
        f"{shown} of {index.samples} observations, evenly spread"
        if shown < index.samples
        else f"all {shown} observations"
    )
    title, unit = f"{some}; sigma_n is below each", "images in [-1, 1]"
    if index.request.get("latents"):
        title, unit = f"{title}; latents, not pixels", "scaled latents"
    pictures = {
        "contact-sheet.png": contact_sheet(contents.shown, title),
        "sigma-n.png": histogram(contents.levels, unit),
    }
    for name, data in pictures.items():
        storage.write_atomically(storage.join(folder, name), data)
        print(f"  {'picture':<12}{storage.join(folder, name)}")
    return errors.DONE


if __name__ == "__main__":
    sys.exit(errors.run(main))
