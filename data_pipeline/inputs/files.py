"""Pictures that are files with names: in a folder, in a zip or in tars. What differs is how their bytes are had."""

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
    """source: as the user wrote it. images: their names. texts: for an image, the names of the `.txt` and `.json` files
    that caption it, read with the image. captions: those known already. read: the bytes of a name."""

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
            if storage.is_url(name) or not its_own:  # credentials that ran out are no reason to reject every image
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
    """Whether a name, or a folder in it, is hidden or macOS's: such files are copies and caches, never pictures."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.removeprefix("./").split("/"))


def open_folder(source: str, names: Sequence[str], suffixes: frozenset[str] = SUFFIXES) -> Source:
    """Image files in a folder. names: of all files in it. Nothing but metadata.jsonl and metadata.csv is opened yet."""
    return named(source, names, partial(_read_in, source), suffixes)


def named(source: str, names: Sequence[str], read: Callable[[str], bytes], suffixes: frozenset[str]) -> Source:
    """A source of the files of these suffixes; a caption is in metadata.jsonl, metadata.csv, or the `.txt` file that
    has the image's name up to the suffix."""
    images = [name for name in names if suffix_of(name) in suffixes]
    if not images:
        raise UserError(
            f"SOURCE {source}: no image in it; looked for {' '.join(sorted(suffixes))}",
            field="SOURCE",
            code="not_found",
        )
    captions = metadata_captions(source, names, images, read)
    texts = {posixpath.splitext(name)[0]: name for name in names if suffix_of(name) == ".txt"}
    beside = {image: [texts[stem]] for image in images if (stem := posixpath.splitext(image)[0]) in texts}
    files = Files(source, images, read, beside, captions)
    return Source(keys_of(source, images), files.picture, files.header, files.picture, _unused(names, images, captions))


def _unused(names: Sequence[str], images: Sequence[str], captions: Mapping[str, str]) -> list[str]:
    stems = {posixpath.splitext(image)[0] for image in images}
    alone = [name for name in names if suffix_of(name) == ".txt" and posixpath.splitext(name)[0] not in stems]
    found = (
        [f"{len(alone)} .txt files caption nothing, as no image has their name, such as {alone[0]}"] if alone else []
    )
    metadata = [name for name in names if posixpath.basename(name) in METADATA]
    if metadata and not captions:
        found.append(f"{metadata[0]} captions nothing: it has no {' or '.join(FIELDS)}")
    return found


def _read_in(folder: str, name: str) -> bytes:
    return storage.read_bytes(storage.join(folder, name))
