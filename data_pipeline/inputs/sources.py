"""Opens a source of clean images: the entry point of `data_pipeline.inputs`. The kind of SOURCE decides how it is
read."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from functools import partial

from ambient_core import storage
from ambient_core.errors import UserError
from data_pipeline.format.types import BadImage
from data_pipeline.inputs import packaged
from data_pipeline.inputs.archives import open_tars, open_zip
from data_pipeline.inputs.arrays import open_npy, open_npz
from data_pipeline.inputs.decode import SUFFIXES
from data_pipeline.inputs.files import is_hidden, open_folder, suffix_of
from data_pipeline.inputs.picture import PerProcess, Picture, Source
from data_pipeline.inputs.prepare import prepare
from data_pipeline.inputs.tables import open_arrow, open_parquet, open_saved
from data_pipeline.inputs.tiff import open_stack

__all__ = ["UNDERSTOOD", "BadImage", "Picture", "Source", "open_source", "prepare"]

UNDERSTOOD = (
    "a folder of images, of .npy pictures, of .tar or .parquet files, or saved by Hugging Face datasets; a .tar "
    f"(or data-{{000..009}}.tar), .zip, .parquet, .arrow, .npy, .npz or .tif file; or "
    f"packaged:{{{','.join(packaged.SETS)}}}"
)
OPENERS = {".zip": open_zip, ".npy": open_npy, ".npz": open_npz, ".tif": open_stack, ".tiff": open_stack}


def open_source(name: str, asked: str = "SOURCE") -> Source:
    """Returns the pictures of SOURCE: a path, any URL of fsspec, or `packaged:NAME[/train|/test]`; see UNDERSTOOD.

    Folders are searched recursively, in the order of their paths. Hidden files are skipped, and linked folders are not
    followed. Listing opens no image. Raises UserError if no kind of source fits, or more than one. asked: the option or
    field that the error names."""
    try:
        return _open(name)
    except UserError as error:
        raise UserError(str(error).replace("SOURCE", asked, 1), field=asked, code=error.code) from None


def _open(name: str) -> Source:
    if not name.strip():
        raise UserError(
            f"SOURCE: is empty (a variable that is not set?): give {UNDERSTOOD}", field="SOURCE", code="missing"
        )
    if name.startswith("packaged:"):
        return _packaged(name.removeprefix("packaged:"))
    if "{" in name and not storage.exists(name):
        return _pattern(name)
    one_file = suffix_of(name) in (*OPENERS, ".tar", ".parquet", ".arrow")
    if not (one_file and storage.is_url(name)) and storage.is_folder(name):  # over http it would read the whole file
        return _folder(name)
    if not storage.exists(name):
        raise UserError(f"SOURCE {name}: no such folder or file; give {UNDERSTOOD}", field="SOURCE", code="not_found")
    return _file(name)


def _file(name: str) -> Source:
    suffix = suffix_of(name)
    if suffix == ".tar":
        return open_tars(name, [name], [posixpath.basename(name)])
    if suffix == ".parquet":
        return open_parquet(name, [name], [posixpath.basename(name)])
    if suffix == ".arrow":
        return open_arrow(name, [name])
    if suffix in OPENERS:
        return OPENERS[suffix](name)
    if suffix in SUFFIXES:
        raise UserError(f"SOURCE {name}: is one image; give the folder that it is in", field="SOURCE", code="invalid")
    if name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise UserError(
            f"SOURCE {name}: a compressed tar cannot be read from any position: uncompress it to .tar",
            field="SOURCE",
            code="unsupported",
        )
    raise UserError(
        f"SOURCE {name}: is not a supported kind of source; give {UNDERSTOOD}", field="SOURCE", code="unsupported"
    )


def _folder(name: str) -> Source:
    names = [file for file in storage.list_files(name) if not is_hidden(file)]
    if "state.json" in names and "dataset_info.json" in names:
        return open_saved(name)
    if "dataset_dict.json" in names:
        splits = sorted(file.partition("/")[0] for file in names if file.endswith("/state.json"))
        raise UserError(
            f"SOURCE {name}: holds the splits {', '.join(splits)}: give the folder of one of them",
            field="SOURCE",
            code="conflict",
        )
    kinds = {"images": SUFFIXES, ".npy": {".npy"}, ".tar": {".tar"}, ".parquet": {".parquet"}}
    found = {kind: [file for file in names if suffix_of(file) in suffixes] for kind, suffixes in kinds.items()}
    found = {kind: files for kind, files in found.items() if files}
    if len(found) > 1:
        counts = " and ".join(
            f"{len(files)} {kind if kind == 'images' else f'{kind} files'}" for kind, files in found.items()
        )
        raise UserError(
            f"SOURCE {name}: holds {counts}: keep one kind in it, or give a file or a folder inside",
            field="SOURCE",
            code="conflict",
        )
    if ".tar" in found:
        return open_tars(name, [storage.join(name, file) for file in found[".tar"]], found[".tar"])
    if ".parquet" in found:
        return open_parquet(name, [storage.join(name, file) for file in found[".parquet"]], found[".parquet"])
    return open_folder(name, names, frozenset({".npy"}) if ".npy" in found else SUFFIXES)


def _pattern(name: str) -> Source:
    from webdataset.shardlists import expand_urls

    paths: Sequence[str] = sorted(dict.fromkeys(expand_urls(name)))
    missing = [path for path in paths if not storage.exists(path)]
    if missing:
        raise UserError(
            f"SOURCE {name}: {len(missing)} of {len(paths)} files are missing, first {missing[0]}",
            field="SOURCE",
            code="not_found",
        )
    bases = [posixpath.basename(path) for path in paths]
    if all(path.endswith(".tar") for path in paths):
        return open_tars(name, paths, bases)
    if all(path.endswith(".parquet") for path in paths):
        return open_parquet(name, paths, bases)
    raise UserError(f"SOURCE {name}: a pattern is for .tar or for .parquet files", field="SOURCE", code="unsupported")


def _packaged(name: str) -> Source:
    set_name, _, split = name.partition("/")
    images = PerProcess(partial(packaged.load, set_name, split or "all"))
    keys = [f"{set_name}-{split or 'all'}-{i:06d}" for i in range(len(images.get()))]
    return Source(keys, partial(_packaged_picture, images))


def _packaged_picture(images: PerProcess[packaged.Images], i: int) -> Picture:
    return Picture(images.get()[i])
