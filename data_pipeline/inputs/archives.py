"""Pictures in zip files and in WebDataset tars. Nothing is extracted: members are read at their offsets in the file."""

from __future__ import annotations

import errno
import posixpath
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from ambient_core import storage
from ambient_core.errors import UserError
from data_pipeline.format.tar import Careful
from data_pipeline.format.types import BadImage
from data_pipeline.inputs.decode import SUFFIXES
from data_pipeline.inputs.files import Files, is_hidden, named, suffix_of
from data_pipeline.inputs.picture import PerProcess, Source, keys_of

TAR_IMAGES = SUFFIXES | {".npy"}
BLOCK = tarfile.BLOCKSIZE


def refuse_outside(source: str, member: str) -> None:
    """Raises UserError for the name of a member that leads out of the archive."""
    parts = member.replace("\\", "/").split("/")
    if ".." in parts or member.startswith(("/", "\\")) or parts[0].endswith(":"):
        raise UserError(
            f"SOURCE {source}: the member {member!r} leads out of the archive (path traversal): it is not safe",
            field="SOURCE",
            code="unreadable",
        )


def open_zip(path: str) -> Source:
    """Returns a source of the image files in a zip. Captions are found as in a folder."""
    archive = PerProcess(partial(_zip_file, path))
    infos = archive.get().infolist()
    for info in infos:
        refuse_outside(path, info.filename)
    names = [info.filename for info in infos if not info.is_dir() and not is_hidden(info.filename)]
    names.sort(key=lambda name: name.split("/"))
    return named(path, names, partial(_read_zip, path, archive), SUFFIXES)


def _zip_file(path: str) -> zipfile.ZipFile:
    with storage.one_error(path):
        try:
            return zipfile.ZipFile(storage.open_binary(path))
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise UserError(
                f"SOURCE {path}: cannot be read as a zip (truncated?): {error}", field="SOURCE", code="unreadable"
            ) from None


def _read_zip(path: str, archive: PerProcess[zipfile.ZipFile], name: str) -> bytes:
    file = archive.get()
    size = file.getinfo(name).file_size
    if size > storage.LARGEST:
        raise BadImage(f"{name}: {size} bytes when unpacked (a decompression bomb?)")
    with storage.one_error(path):
        try:
            return file.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            raise BadImage(f"{name}: cannot be unpacked: {error}") from None
        except OSError as error:
            if error.errno == errno.EINVAL:  # its offset is negative
                raise BadImage(f"{name}: cannot be unpacked: it lies outside the zip") from None
            raise


def open_tars(source: str, paths: Sequence[str], names: Sequence[str]) -> Source:
    """Returns a source of the samples in WebDataset tars. The members of a sample have the same name up to the first
    dot. A sample has one image, and may have a caption: in `.txt`, or in the field `caption` or `text` of `.json`. If
    there are several tars, keys begin with the tar's name. names: the names of the tars."""
    places: dict[str, tuple[str, int, int]] = {}
    for path, tar in zip(paths, names, strict=True):
        for member, start, size in _members(path):
            name = f"{tar.removesuffix('.tar')}/{member}" if len(paths) > 1 else member
            if name in places:
                raise UserError(
                    f"SOURCE {source}: two members are named {name}: rename one", field="SOURCE", code="conflict"
                )
            places[name] = (path, start, start + size)
    images = [name for name in places if suffix_of(name) in TAR_IMAGES]
    if not images:
        raise UserError(
            f"SOURCE {source}: no image in it; looked for members {' '.join(sorted(TAR_IMAGES))}",
            field="SOURCE",
            code="not_found",
        )
    samples: dict[str, str] = {}
    for image in images:
        if (other := samples.setdefault(_sample(image), image)) != image:
            raise UserError(
                f"SOURCE {source}: the sample {_sample(image)} (a name up to its first dot) has two images,"
                f" {posixpath.basename(other)} and {posixpath.basename(image)}: keep one",
                field="SOURCE",
                code="conflict",
            )
    texts: dict[str, list[str]] = {}
    for name in places:
        if suffix_of(name) in (".txt", ".json") and (image := samples.get(_sample(name))) is not None:
            texts.setdefault(image, []).append(name)
    files = Files(source, images, partial(_read_tar, places), texts)
    return Source(keys_of(source, images), files.picture, files.header, files.picture)


def _sample(name: str) -> str:
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _members(path: str) -> Iterator[tuple[str, int, int]]:
    """Yields the name, offset and size of each file in a tar, from its headers alone."""
    end = 0
    with storage.one_error(path), storage.open_binary(path) as file:
        try:
            with tarfile.open(fileobj=Careful(file), mode="r:") as tar:
                for member in tar:
                    refuse_outside(path, member.name)
                    end = member.offset_data + (-(-member.size // BLOCK) * BLOCK if member.isreg() else 0)
                    if is_hidden(member.name) or member.isdir():
                        continue
                    if not member.isreg() or member.issparse():
                        raise UserError(
                            f"SOURCE {path}: the member {member.name!r} is a link or not a plain file",
                            field="SOURCE",
                            code="unreadable",
                        )
                    yield member.name.removeprefix("./"), member.offset_data, member.size
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue] -- or it would keep a million headers
        except tarfile.TarError as error:
            raise UserError(
                f"SOURCE {path}: cannot be read as a tar (truncated, or compressed?): {error}",
                field="SOURCE",
                code="unreadable",
            ) from None
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):  # tarfile accepts a tar without its end mark
            raise UserError(
                f"SOURCE {path}: ends without a tar's end mark (truncated?): copy it again",
                field="SOURCE",
                code="unreadable",
            )


def _read_tar(places: Mapping[str, tuple[str, int, int]], name: str) -> bytes:
    path, start, end = places[name]
    data = storage.read_bytes(path, start, end)
    if len(data) != end - start:
        raise UserError(f"SOURCE {path}: became shorter while it was read", field="SOURCE", code="unreadable")
    return data
