"""Reads TIFF files with tifffile: single pictures and stacks, 8 or 16 bits or floats, any number of channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from struct import unpack
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ambient_core import storage
from ambient_core.errors import UserError, one_line
from data_pipeline.format.types import BadImage
from data_pipeline.inputs.picture import DTYPES, PerProcess, Picture, Source, canonical

if TYPE_CHECKING:
    from tifffile import TiffFile

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BITS, PHOTOMETRIC, ORIENTATION, EXTRA_SAMPLES, SAMPLE_FORMAT = 258, 262, 274, 338, 339
ALPHA = (1, 2)
"""TIFF's kinds of extra samples that are alpha, not channels."""
COMPRESSIONS = {1: "none", 8: "deflate", 32946: "deflate", 34925: "LZMA", 50000: "zstd"}
"""The compressions that tifffile may unpack. LZW is not one of them: its decoder, in imagecodecs, ends the process if a
file is damaged."""


def is_scientific(image: Image.Image) -> bool:
    """Whether Pillow would lose bits, pages or channels of this TIFF. It reads 16-bit and float32 grey completely."""
    tags = getattr(image, "tag_v2", {})
    bits, kinds = max(tags.get(BITS, (1,))), max(tags.get(SAMPLE_FORMAT, (1,)))
    extra = any(kind not in ALPHA for kind in tags.get(EXTRA_SAMPLES, ()))
    grey = tags.get(PHOTOMETRIC) == 1 and (bits, kinds, image.mode[0]) in ((16, 1, "I"), (32, 3, "F"))
    return extra or getattr(image, "n_frames", 1) > 1 or (not grey and (bits > 8 or kinds > 1 or image.mode[0] in "IF"))


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Rotates and mirrors (H, W, ...) according to EXIF's or TIFF's orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = np.swapaxes(pixels, 0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


@dataclass(frozen=True)
class _Layout:
    """The arrangement of the pictures in a file. planes: planes[i] has the numbers of the pages that are the channels
    of picture i. page: the shape of a page, (H, W), (H, W, S) or (S, H, W). kept: how many of S are not alpha; None
    without S. planar: a page is (S, H, W)."""

    planes: NDArray[np.intp]
    page: tuple[int, ...]
    kept: int | None
    planar: bool


def _layout(file: TiffFile, name: str) -> _Layout:
    """Returns the layout of a file. Raises UserError if its pages are not pictures of one kind."""
    _check_chain(file)
    series, first = file.series[0], file.pages[0]
    axes, shape = series.axes, series.shape
    if len(file.series) > 1:
        shapes = ", ".join(str(s.shape) for s in file.series[:3])
        raise UserError(
            f"{name}: holds {len(file.series)} series of pages ({shapes}...): save one of them alone",
            field=name,
            code="unsupported",
        )
    if str(series.dtype) not in DTYPES:
        raise UserError(
            f"{name}: {series.dtype} pixels; convert them to one of {', '.join(DTYPES)}", field=name, code="unsupported"
        )
    if int(getattr(first, "photometric", 1)) not in (0, 1, 2):
        raise UserError(
            f"{name}: a TIFF in {getattr(first, 'photometric', None)!r}: convert it to grey or RGB",
            field=name,
            code="unsupported",
        )
    if getattr(first, "compression", 1) not in COMPRESSIONS:
        raise UserError(
            f"{name}: compressed by {getattr(first, 'compression', None)!r}, which is supported only for single "
            "pictures in grey or in 8 bits: save it uncompressed, or with deflate",
            field=name,
            code="unsupported",
        )
    page = tuple(n for axis, n in zip(axes, shape, strict=True) if axis in "YXS")
    stacked = [(axis, n) for axis, n in zip(axes, shape, strict=True) if axis not in "YXS"]
    planes = np.arange(math.prod(n for _, n in stacked), dtype=np.intp).reshape([n for _, n in stacked])
    along = [i for i, (axis, _) in enumerate(stacked) if axis == "C"]
    planes = np.moveaxis(planes, along, [-1]).reshape(-1, stacked[along[0]][1]) if along else planes.reshape(-1, 1)
    sizes, limit = dict(zip(axes, shape, strict=True)), Image.MAX_IMAGE_PIXELS or math.inf
    pixels, samples = sizes.get("Y", 1) * sizes.get("X", 1), planes.shape[1] * sizes.get("S", 1)
    if pixels > limit or pixels * samples > 4 * limit:
        raise UserError(
            f"{name}: shape {shape}, over the limit of {limit} pixels (a decompression bomb?)",
            field=name,
            code="invalid",
        )
    if len(series) < planes.size and (series.dataoffset or file.filehandle.size) + series.nbytes > file.filehandle.size:
        raise UserError(f"{name}: says shape {shape}, but pages are missing", field=name, code="unreadable")
    alpha = sum(int(kind) in ALPHA for kind in getattr(first, "extrasamples", ()))
    return _Layout(
        planes, page, sizes["S"] - alpha if "S" in axes else None, "S" in axes and axes.index("S") == len(stacked)
    )


def _check_chain(file: TiffFile) -> None:
    """Raises ValueError if a page is followed by an earlier one: tifffile would loop for ever."""
    kind, handle = file.tiff, file.filehandle
    handle.seek(8 if kind.is_bigtiff else 4)
    seen: set[int] = set()
    while len(data := handle.read(kind.offsetsize)) == kind.offsetsize and (
        start := unpack(kind.offsetformat, data)[0]
    ):
        if start in seen:
            raise ValueError("its pages follow each other in a circle")
        seen.add(start)
        handle.seek(start)
        count = handle.read(kind.tagnosize)
        if len(count) < kind.tagnosize:
            return
        handle.seek(start + kind.tagnosize + unpack(kind.tagnoformat, count)[0] * kind.tagsize)


def _picture(file: TiffFile, layout: _Layout, i: int) -> NDArray[Any]:
    """Returns picture i, (H, W, C)."""
    channels: list[NDArray[Any]] = []
    for number in layout.planes[i]:
        plane = _page(file, layout, int(number))
        plane = np.moveaxis(plane, 0, -1) if layout.planar else plane
        channels.append(plane[..., None] if layout.kept is None else plane[..., : layout.kept])
    pixels = np.concatenate(channels, axis=-1)
    first = file.pages[0]
    if int(getattr(first, "photometric", 1)) == 0 and pixels.dtype.kind == "u":  # 0 is white
        pixels = np.iinfo(pixels.dtype).max - pixels
    tag = getattr(first, "tags", {}).get(ORIENTATION)
    return upright(pixels, 1 if tag is None else int(tag.value))


def _page(file: TiffFile, layout: _Layout, number: int) -> NDArray[Any]:
    series = file.series[0]
    if len(series) < layout.planes.size:  # ImageJ describes only the first page; the others follow it
        count, dtype = math.prod(layout.page), series.dtype.newbyteorder(file.byteorder)
        start = int(series.dataoffset or 0) + number * count * dtype.itemsize
        return file.filehandle.read_array(dtype, count, start).reshape(layout.page)
    page = series[number]
    limit = 4 * (Image.MAX_IMAGE_PIXELS or math.inf)
    if page is None or tuple(page.shape) != layout.page or math.prod(page.chunks) > limit:
        raise ValueError(f"page {number} is missing, or not of the shape {layout.page}")
    if page.compression not in COMPRESSIONS:
        raise ValueError(f"page {number} is compressed by {page.compression!r}")
    return np.asarray(page.asarray()).reshape(layout.page)


def one(data: bytes, name: str) -> NDArray[Any]:
    """Returns the only picture in a TIFF. Raises BadImage, also for a stack."""
    try:
        with _tifffile().TiffFile(BytesIO(data)) as file:
            layout = _layout(file, name)
            if len(layout.planes) > 1:
                series = file.series[0]
                raise BadImage(
                    f"{name}: a stack of {len(layout.planes)} pictures (axes {series.axes} {series.shape}):"
                    " give this file alone as SOURCE, split stacks beforehand (docs/data.md), or say in its "
                    "metadata that its pages are channels (axes CYX)",
                    code="unsupported",
                )
            return canonical(_picture(file, layout, 0), BadImage, name)
    except UserError as error:
        raise BadImage(str(error), code=error.code) from None
    except MemoryError:
        raise
    except Exception as error:  # broken files raise errors of any type
        raise BadImage(_reason(error, name)) from None


def open_stack(path: str) -> Source:
    """Returns a source of all pictures in one TIFF file. Pages are pictures, except along a channel axis (C or S)."""
    file = PerProcess(partial(_open_path, path))
    try:
        layout = _layout(file.get(), f"SOURCE {path}")
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"SOURCE {_reason(error, path)}", field="SOURCE", code="unreadable") from None
    keys = [f"page-{i:06d}" for i in range(len(layout.planes))]
    return Source(keys, partial(_read, file, layout, path))


def _read(file: PerProcess[TiffFile], layout: _Layout, path: str, i: int) -> Picture:
    name = f"{path}, picture {i}"
    try:
        return Picture(canonical(_picture(file.get(), layout, i), BadImage, name))
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:
        raise BadImage(_reason(error, name)) from None


def _open_path(path: str) -> TiffFile:
    return _tifffile().TiffFile(storage.open_binary(path))


def _tifffile() -> Any:
    import tifffile

    return tifffile


def _reason(error: Exception, name: str) -> str:
    text = one_line(error, 200)
    codec = ": pip install imagecodecs" if isinstance(error, ImportError) or "imagecodecs" in text else ""
    return f"{name}: cannot be read as an image: {text}{codec}"
