"""Pictures that are files with names: in a folder, in a zip or in tars. Only the way to read their bytes differs."""

from __future__ import annotations

import errno
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from ambient_core import storage
from ambient_core.errors import UserError
from data_pipeline.format.types import BadImage
from data_pipeline.inputs.captions import FIELDS, METADATA, agreed, json_caption, metadata_captions, text_caption
from data_pipeline.inputs.decode import SUFFIXES, decode, size_in
from data_pipeline.inputs.picture import Picture, Source, keys_of


@dataclass(frozen=True)
class Files:
    """Image files and their captions. source: as the user wrote it. images: the names of the image files. texts: for an
    image, the names of the `.txt` and `.json` files that caption it; they are read with the image. captions: the
    captions that are known already, by image. read: takes a file's name and returns its bytes."""

    source: str
    images: Sequence[str]
    read: Callable[[str], bytes]
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    captions: Mapping[str, str] = field(default_factory=dict[str, str])

    def picture(self, i: int, size: int | None = None) -> Picture:
        image = self.images[i]
        name = storage.join(self.source, image)
        try:
            pixels = decode(self.read(image), name, size)
            captions = [self.captions.get(image)]
            for text in self.texts.get(image, ()):
                parse = json_caption if text.endswith(".json") else text_caption
                captions.append(parse(self.read(text), storage.join(self.source, text)))
        except FileNotFoundError:
            raise BadImage(f"{name}: cannot be read as an image: it is gone", code="not_found") from None
        except OSError as error:
            its_own = error.errno in (errno.EACCES, errno.EPERM, errno.EFBIG)
            if storage.is_url(name) or not its_own:  # expired credentials are no reason to reject every image
                raise
            raise BadImage(f"{name}: cannot be read as an image: {error.strerror}") from None
        return Picture(pixels, agreed(captions, name))

    def header(self, i: int) -> tuple[int, int] | None:
        try:
            return size_in(self.read(self.images[i]))
        except OSError:
            return None


def suffix_of(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder in its path, is hidden or macOS's own. Such files are copies and caches, never
    pictures."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.removeprefix("./").split("/"))


def open_folder(source: str, names: Sequence[str], suffixes: frozenset[str] = SUFFIXES) -> Source:
    """Returns a source of the image files in a folder. names: the names of all files in the folder. No file
    except metadata.jsonl and metadata.csv is opened yet."""
    return named(source, names, partial(_read_in, source), suffixes)


def named(source: str, names: Sequence[str], read: Callable[[str], bytes], suffixes: frozenset[str]) -> Source:
    """Returns a source of the files with these suffixes. A caption is in metadata.jsonl, metadata.csv, or the `.txt`
    file that has the image's name up to the suffix."""
    images = [name for name in names if suffix_of(name) in suffixes]
    if not images:
        raise UserError(
            f"SOURCE {source}: no image in it; looked for {' '.join(sorted(suffixes))}",
            field="SOURCE",
            code="not_found",
        )
    captions = metadata_captions(source, names, images, read)
    by_stem = {posixpath.splitext(name)[0]: name for name in names if suffix_of(name) == ".txt"}
    texts = {image: [by_stem[stem]] for image in images if (stem := posixpath.splitext(image)[0]) in by_stem}
    files = Files(source, images, read, texts, captions)
    return Source(keys_of(source, images), files.picture, files.header, files.picture, _unused(names, images, captions))


def _unused(names: Sequence[str], images: Sequence[str], captions: Mapping[str, str]) -> list[str]:
    stems = {posixpath.splitext(image)[0] for image in images}
    alone = [name for name in names if suffix_of(name) == ".txt" and posixpath.splitext(name)[0] not in stems]
    messages = (
        [f"{len(alone)} .txt files caption nothing, as no image has their name, such as {alone[0]}"] if alone else []
    )
    metadata = [name for name in names if posixpath.basename(name) in METADATA]
    if metadata and not captions:
        messages.append(f"{metadata[0]} captions nothing: it has no {' or '.join(FIELDS)}")
    return messages


def _read_in(folder: str, name: str) -> bytes:
    return storage.read_bytes(storage.join(folder, name))
