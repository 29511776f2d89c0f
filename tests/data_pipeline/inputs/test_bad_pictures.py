"""What is wrong with one picture is a BadImage, in one line; the others are read."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tifffile
from PIL import Image

from ambient_core.errors import Code, UserError
from data_pipeline.inputs.sources import BadImage, Source, open_source
from tests.data_pipeline.inputs.test_bad_sources import GREY, HUGE, PICKLED, P, array_bytes, parquet, tar, zip_of
from tests.data_pipeline.inputs.test_sources import PIXELS
from tests.refusals import refused


def huge_png(width: int, height: int) -> bytes:
    header = struct.pack(">II5B", width, height, 8, 0, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def tiff_bytes(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def bad_size(data: bytes) -> bytes:
    """A TIFF of (20, 16) that claims a width and a height of 40000."""
    for tag, size in ((256, 16), (257, 20)):
        data = data.replace(struct.pack("<HHII", tag, 4, 1, size), struct.pack("<HHII", tag, 4, 1, 40000))
    return data


DEEP = tiff_bytes(np.zeros((20, 16), np.uint16))
LZW = tiff_bytes(np.zeros((20, 16), np.uint16), compression="lzw")
TWO = tiff_bytes(np.zeros((2, 20, 16), np.uint16), photometric="minisblack")
TWICE = struct.unpack("<I", TWO[4:8])[0]  # where the first page is described


def in_a_circle() -> bytes:
    """A TIFF whose second page is followed by its first."""
    end = TWICE + 2 + 12 * struct.unpack("<H", TWO[TWICE : TWICE + 2])[0]
    second = struct.unpack("<I", TWO[end : end + 4])[0]
    end = second + 2 + 12 * struct.unpack("<H", TWO[second : second + 2])[0]
    return TWO[:end] + TWO[4:8] + TWO[end + 4 :]


BAD = [
    (b"", "cannot be read as an image: the file is empty"),
    (b"not a picture", "cannot be read as an image: no format that is known"),
    (P[:200], "cannot be read as an image: "),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no format that is known"),
    (huge_png(12000, 10000), "(120000000 pixels) exceeds limit of 89478485"),
    (huge_png(100000, 100000), "(10000000000 pixels) exceeds limit"),
    (bad_size(DEEP), "exceeds limit of"),
    (DEEP[:-100], "cannot be read as an image: "),
    (in_a_circle(), "its pages follow each other in a circle"),
    (LZW[:256] + b"\xff" * len(LZW[256:]), "cannot be read as an image: "),
    (tiff_bytes(np.zeros((20, 16, 3), np.uint16), compression="lzw"), "save it uncompressed, or with deflate"),
    (tiff_bytes(GREY), "a stack of 6 pictures (axes QYX (6, 9, 8)): give this file alone as SOURCE"),
    (tiff_bytes(GREY[0].astype(np.int32)), "int32 pixels"),
    (PICKLED, "holds pickled objects, which are never loaded"),
    (HUGE, "its header says (8888888, 8888, 888)"),
    (array_bytes(np.zeros((8, 8, 8), np.uint8)), "its shape (8, 8, 8) may be (H, W, C) or (C, H, W)"),
    (array_bytes(np.zeros((2, 8, 8, 3), np.uint8)), "its shape is (2, 8, 8, 3), one picture has (H, W)"),
    (array_bytes(np.zeros((8, 8), np.complex64)), "complex64 pixels"),
    (array_bytes(np.zeros((0, 8), np.uint8)), "no pixels, its shape is (0, 8)"),
    (b"P6 1 1 4095 abcdef", "PPM with 16 bits a channel is not read"),
]


def in_folder(path: Path, data: bytes) -> Source:
    for name, content in {"a.png": P, "b.png": data, "c.png": P}.items():
        (path / name).write_bytes(content)
    return open_source(str(path))


def in_parquet(path: Path, data: bytes) -> Source:
    return open_source(str(path / parquet(path, image=[P, data, P])))


def in_tar(path: Path, data: bytes) -> Source:
    return open_source(str(path / tar(path, ("a.png", P), ("b.png", data), ("c.png", P))))


@pytest.mark.parametrize(("data", "expected"), BAD)
@pytest.mark.parametrize("source_of", [in_folder, in_tar, in_parquet], ids=lambda f: f.__name__)
def test_a_picture_that_is_wrong_leaves_the_others(
    source_of: Callable[[Path, bytes], Source], data: bytes, expected: str, tmp_path: Path
) -> None:
    source = source_of(tmp_path, data)
    messages: list[str] = []
    for _ in range(2):
        with pytest.raises(BadImage) as error:
            source.read(1)
        messages.append(str(error.value))
    assert expected in messages[0]
    assert messages[0] == messages[1], "the same in every run"
    assert "\n" not in messages[0]
    for i in (0, 2):
        np.testing.assert_array_equal(source.read(i).pixels, PIXELS[0])


def test_one_picture_of_a_zip_or_of_a_table_that_has_no_bytes(tmp_path: Path) -> None:
    path = tmp_path / zip_of(tmp_path, "a.png", "b.png")
    data = bytearray(path.read_bytes())
    data[data.index(P) + len(P) // 2] ^= 255  # of the first
    path.write_bytes(data)
    source = open_source(str(path))
    with pytest.raises(BadImage, match=r"a\.png: cannot be unpacked: Bad CRC-32"):
        source.read(0)
    np.testing.assert_array_equal(source.read(1).pixels, PIXELS[0])
    (tmp_path / "secret.png").write_bytes(P)
    image = pa.array(
        [{"bytes": None, "path": str(tmp_path / "secret.png")}],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    with pytest.raises(BadImage, match=r"only the path '.*secret\.png', which is not opened"):
        open_source(str(tmp_path / parquet(tmp_path, image=image))).read(0)


@pytest.mark.parametrize(
    ("files", "kind", "field", "mistake"),
    [
        (
            {"a.png": P, "a.txt": b"x", "metadata.csv": b"file_name,text\na.png,y"},
            UserError,
            "a.png",
            "conflict",
        ),
        ({"a.png": P, "a.txt": b"\xff"}, BadImage, "SOURCE", "unreadable"),
    ],
)
def test_a_caption_that_is_wrong(
    files: dict[str, bytes], kind: type[UserError], field: str, mistake: Code, tmp_path: Path
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with refused(field, mistake) as error:
        open_source(str(tmp_path)).read(0)
    assert error.type is kind


def test_a_picture_that_went_away_is_one_bad_image(tmp_path: Path) -> None:
    source = in_folder(tmp_path, P)
    (tmp_path / "b.png").unlink()
    with pytest.raises(BadImage, match=r"b\.png: cannot be read as an image: it is gone"):
        source.read(1)
    assert Image.fromarray(source.read(0).pixels).size == (11, 14)
