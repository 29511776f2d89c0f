"""What is wrong with a source as a whole is a UserError, in one line that names it."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile

from ambient_core.errors import UserError
from data_pipeline.inputs.sources import open_source
from tests.data_pipeline.inputs.test_sources import PNGS, one_tar, saved_by_datasets, write_tar, zipped
from tests.refusals import refused


def array_bytes(array: np.ndarray, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


class Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return open, ("/nothing/unpickled",)


PICKLED = array_bytes(np.array([Evil()] * 9, dtype=object), pickled=True)
HUGE = array_bytes(np.zeros((8, 8, 8), np.uint8)).replace(b"(8, 8, 8), ", b"(8888888, 8888, 888), ")


def folder(path: Path, **files: bytes) -> str:
    for name, data in files.items():
        place = path / "data" / name.replace("__", "/").replace("_", ".")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return "data"


def file(path: Path, name: str, data: bytes) -> str:
    (path / name).write_bytes(data)
    return name


def tar(path: Path, *members: tuple[str, bytes]) -> str:
    write_tar(path / "a.tar", list(members))
    return "a.tar"


def cut(path: Path, write: Callable[[Path], str], keep: float) -> str:
    name = write(path)
    data = (path / name).read_bytes()
    return file(path, name, data[: int(len(data) * keep)])


def without_end(path: Path) -> str:
    data = (path / one_tar(path)).read_bytes()
    end = max(i for i in range(0, len(data), 512) if any(data[i : i + 512])) + 512
    return file(path, "all.tar", data[:end])


def zip_of(path: Path, *names: str) -> str:
    with zipfile.ZipFile(path / "a.zip", "w") as archive:
        for name in names:
            archive.writestr(name, PNGS[0])
    return "a.zip"


def linked(path: Path) -> str:
    with tarfile.open(path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    return "a.tar"


def parquet(path: Path, **columns: object) -> str:
    pq.write_table(pa.table(columns), path / "a.parquet")  # pyright: ignore[reportArgumentType]
    return "a.parquet"


def saved(path: Path, **state: object) -> str:
    saved_by_datasets(path)
    changed = json.loads((path / "state.json").read_text()) | state
    (path / "state.json").write_text(json.dumps(changed))
    return ""


def stack(path: Path, array: np.ndarray, **options: object) -> str:
    tifffile.imwrite(path / "a.tif", array, **options)  # pyright: ignore[reportArgumentType]
    return "a.tif"


def npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path / "a.npz", **arrays)  # pyright: ignore[reportArgumentType]
    return "a.npz"


def splits(path: Path) -> str:
    for name in ("dataset_dict.json", "test/state.json", "train/state.json"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
    return ""


P = PNGS[0]
GREY = np.zeros((6, 9, 8), np.uint8)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: "nowhere", "no such folder or file; give a folder of images, of .npy pictures"),
        (lambda p: file(p, "a.doc", b"x"), "a.doc: is not a supported kind of source; give a folder of images"),
        (lambda p: file(p, "a.png", P), "is one image; give the folder that it is in"),
        (lambda p: file(p, "a.tar.gz", b"x"), "a compressed tar cannot be read from any position: uncompress it"),
        (lambda p: folder(p, a_doc=b"x"), "no image in it; looked for .bmp .jpeg"),
        (lambda p: folder(p, a_png=P, b__c_tar=b"x"), "holds 1 images and 1 .tar files: keep one kind in it"),
        (splits, "holds the splits test, train: give the folder of one"),
        (lambda p: "data-{000..002}.tar", "3 files are missing, first "),
        (
            lambda p: (file(p, "a.png", P), file(p, "b.png", P), "{a,b}.png")[-1],
            "a pattern is for .tar or for .parquet",
        ),
        # tars
        (lambda p: cut(p, one_tar, 0.01), "all.tar: cannot be read as a tar"),
        (without_end, "all.tar: ends without a tar's end mark (truncated?)"),
        (lambda p: tar(p, ("../a.png", P)), "the member '../a.png' leads out of the archive (path traversal)"),
        (lambda p: tar(p, ("/etc/a.png", P)), "the member '/etc/a.png' leads out of the archive"),
        (lambda p: tar(p, ("b/../../a.txt", P)), "the member 'b/../../a.txt' leads out"),
        (linked, "the member 'a.png' is a link or not a plain file"),
        (lambda p: tar(p, ("a.png", P), ("a.png", P)), "two members are named a.png: rename one"),
        (
            lambda p: tar(p, ("a.b.png", P), ("a_b.png", P)),
            "a.b.png and a_b.png would both be named a_b_png: rename one",
        ),
        (
            lambda p: tar(p, ("s/a.x.png", P), ("s/a.y.png", P)),
            "the sample s/a (a name up to its first dot) has two images",
        ),
        (lambda p: tar(p, ("a.cls", b"1")), "no image in it; looked for members .bmp"),
        # zips
        (lambda p: zip_of(p, "../a.png"), "the member '../a.png' leads out of the archive (path traversal)"),
        (lambda p: zip_of(p, "a.png", "..\\a.png"), "leads out of the archive"),
        (lambda p: zip_of(p, "C:/a.png"), "the member 'C:/a.png' leads out"),
        (lambda p: zip_of(p, "a/b.png", "a__b.png"), "a/b.png and a__b.png would both be named a__b_png"),
        (lambda p: cut(p, zipped, 0.5), "all.zip: cannot be read as a zip (truncated?)"),
        # captions
        (
            lambda p: folder(p, a_png=P, metadata_jsonl=b'{"file_name": "b.png", "text": "x"}'),
            "metadata.jsonl line 1: file_name b.png: there is no such image",
        ),
        (lambda p: folder(p, a_png=P, metadata_jsonl=b'\n{"text": "x"}'), "metadata.jsonl line 2: no file_name in it"),
        (lambda p: folder(p, a_png=P, metadata_jsonl=b"{"), "metadata.jsonl line 1: not JSON"),
        (
            lambda p: folder(p, a_png=P, metadata_jsonl=b'{"file_name": "a.png", "text": 3}'),
            "line 1: a caption that is not text: 3",
        ),
        (lambda p: folder(p, a_png=P, metadata_csv=b"name,text\na.png,x"), "metadata.csv line 2: no file_name in it"),
        (lambda p: folder(p, a_png=P, metadata_csv=b"file_name,text\na.png,\xff"), "metadata.csv: is not UTF-8"),
        (
            lambda p: folder(p, a_png=P, metadata_csv=b"file_name,text\na.png,x\na.png,y"),
            "line 3: a.png: two captions that differ, 'x' and 'y'",
        ),
        (
            lambda p: folder(
                p,
                a_png=P,
                metadata_csv=b"file_name,text\na.png,x",
                metadata_jsonl=b'{"file_name": "./a.png", "text": "y"}',
            ),
            "two captions that differ, 'x' and 'y': keep one",
        ),
        # arrays
        (lambda p: file(p, "a.npy", PICKLED), "a.npy: holds pickled objects, which are never loaded"),
        (lambda p: file(p, "a.npy", b"no array"), "a.npy: not an .npy file"),
        (
            lambda p: file(p, "a.npy", HUGE),
            "its header says (8888888, 8888, 888) uint8, 70155939651072 bytes, the file has 523",
        ),
        (
            lambda p: file(p, "a.npy", array_bytes(GREY)[:-1]),
            "its header says (6, 9, 8) uint8, 432 bytes, the file has 431",
        ),
        (lambda p: file(p, "a.npy", array_bytes(GREY.astype(np.int32))), "int32 pixels; convert them to one of uint8"),
        (lambda p: file(p, "a.npy", array_bytes(GREY > 0)), "bool pixels; convert them"),
        (lambda p: file(p, "a.npy", array_bytes(GREY[:0])), "its shape is (0, 9, 8); give (N, H, W)"),
        (lambda p: file(p, "a.npy", array_bytes(GREY[0])), "its shape is (9, 8); give (N, H, W)"),
        (
            lambda p: file(p, "a.npy", array_bytes(GREY[..., :3].copy())),
            "its shape (6, 9, 3) may be (N, H, W) or one picture",
        ),
        (
            lambda p: file(p, "a.npy", array_bytes(np.zeros((5, 8, 8, 8), np.uint8))),
            "its shape (5, 8, 8, 8) may be (N, H, W, C) or (N, C, H, W)",
        ),
        (lambda p: file(p, "a.npy", array_bytes(np.asfortranarray(GREY))), "in Fortran's order"),
        (lambda p: npz(p, x=GREY, y=GREY), "a.npz: holds x, y; name the array images or arr_0"),
        (
            lambda p: npz(p, images=GREY, captions=np.array(["a"])),
            "captions are <U1 (1,); give one text for each of 6 images",
        ),
        (lambda p: npz(p, images=GREY, captions=np.array([None] * 6)), "captions.npy: holds pickled objects"),
        (lambda p: file(p, "a.npz", b"PK"), "a.npz: cannot be read as an .npz (truncated?)"),
        # TIFF
        (lambda p: file(p, "a.tif", b"II*\0no"), "a.tif: cannot be read as an image"),
        (lambda p: stack(p, GREY.astype(np.int16)), "int16 pixels; convert them"),
        (
            lambda p: stack(p, GREY, photometric="palette", colormap=np.zeros((3, 256), np.uint16)),
            "convert it to grey or RGB",
        ),
        # tables
        (lambda p: parquet(p, x=[1]), "no column of images (bytes, or a struct with bytes) among x"),
        (lambda p: parquet(p, x=[b"1"], y=[b"2"]), "the columns x, y may all be the images: name one of them image"),
        (lambda p: parquet(p, image=pa.array([], pa.binary())), "no rows in it"),
        (lambda p: file(p, "a.parquet", b"PAR1x"), "a.parquet: cannot be read as parquet (truncated?)"),
        (
            lambda p: file(p, "a.parquet", b"PAR1" + bytes(40) + b"\1\0\0\0PAR1"),
            "a.parquet: cannot be read as parquet (truncated?)",
        ),
        (
            lambda p: saved(p, _data_files=[{"filename": "../data.arrow"}]),
            "names files in other folders: it is not safe",
        ),
        (
            lambda p: saved(p, _data_files=[{"filename": "x.arrow"}]),
            "x.arrow: no such file, though state.json names it",
        ),
        (lambda p: saved(p, _indices_data_files=[{"filename": "i.arrow"}]), "call flatten_indices()"),
        (lambda p: saved(p, _data_files=3), "a state.json that cannot be read"),
        (
            lambda p: (saved(p), file(p, "data-00001-of-00002.arrow", b"x"), "")[-1],
            "cannot be read as Arrow (truncated?)",
        ),
    ],
)
def test_a_source_that_is_wrong(make: Callable[[Path], str], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        open_source(str(tmp_path / make(tmp_path)))
    assert error.type is UserError
    assert expected in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tar_is_found_to_be_truncated_wherever_it_was_cut(tmp_path: Path) -> None:
    whole = (tmp_path / one_tar(tmp_path)).read_bytes()
    end = max(i for i in range(0, len(whole), 512) if any(whole[i : i + 512])) + 512
    for length in sorted({*range(0, end, 301), *range(0, end + 1, 512)}):
        (tmp_path / "all.tar").write_bytes(whole[:length])
        with refused("SOURCE", "unreadable"):
            open_source(str(tmp_path / "all.tar"))
    (tmp_path / "all.tar").write_bytes(whole[: end + 512])
    assert len(open_source(str(tmp_path / "all.tar"))) == 7


def test_a_url_of_an_unknown_kind_and_a_backend_that_is_missing() -> None:
    with refused("SOURCE", "invalid"):
        open_source("nope://bucket/a")
