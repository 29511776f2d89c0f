"""Captions next to image files: metadata.jsonl, metadata.csv, or a text file for each image.

If two of them have a caption for the same image, the captions must be equal; so none takes precedence over another.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ambient_core.errors import UserError
from ambient_core.parsing import from_json
from data_pipeline.format.types import BadImage

METADATA = ("metadata.jsonl", "metadata.csv")
FIELDS = ("text", "caption")


def caption_in(record: Mapping[str, Any], name: str) -> str | None:
    """Returns the caption in the field `text` or `caption` of a record; None if both are missing or null. name: for
    messages."""
    found = [record[field] for field in FIELDS if record.get(field) is not None]
    if any(not isinstance(caption, str) for caption in found):
        raise UserError(f"{name}: a caption that is not text: {found[0]!r}", field=name, code="unreadable")
    return agreed(found, name)


def agreed(captions: Iterable[str | None], name: str) -> str | None:
    """Returns the one caption among those that are not None, without space around it; None if there is none. Raises
    UserError if two captions differ."""
    distinct = list(dict.fromkeys(caption.strip() for caption in captions if caption is not None))
    if len(distinct) > 1:
        raise UserError(
            f"{name}: two captions that differ, {distinct[0][:40]!r} and {distinct[1][:40]!r}: keep one",
            field=name,
            code="conflict",
        )
    return distinct[0] if distinct else None


def text_caption(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BadImage(f"{name}: the caption is not UTF-8") from None


def json_caption(data: bytes, name: str) -> str | None:
    """Returns the caption in a WebDataset `.json` member; None if it has no caption."""
    try:
        record = from_json(data)
    except ValueError as error:
        raise BadImage(f"{name}: not JSON: {error}") from None
    return caption_in(record, name) if isinstance(record, dict) else None


def metadata_captions(
    source: str, names: Iterable[str], images: Iterable[str], read: Callable[[str], bytes]
) -> dict[str, str]:
    """Returns the captions by image name, from every metadata.jsonl and metadata.csv among `names`. A `file_name` in
    them is relative to the folder of the metadata file. Raises UserError if it names no image of the source."""
    files = [name for name in names if posixpath.basename(name) in METADATA]
    captions: dict[str, str] = {}
    known = frozenset(images) if files else frozenset[str]()
    for file in files:
        parse = _jsonl if file.endswith(".jsonl") else _csv
        for line, record in parse(read(file), f"SOURCE {source}: {file}"):
            name = f"SOURCE {source}: {file} line {line}"
            if not isinstance(record.get("file_name"), str):
                raise UserError(f"{name}: no file_name in it", field=name, code="invalid")
            image = posixpath.normpath(posixpath.join(posixpath.dirname(file), record["file_name"]))
            if image not in known:
                raise UserError(
                    f"{name}: file_name {record['file_name']}: there is no such image", field=name, code="not_found"
                )
            caption = agreed([captions.get(image), caption_in(record, name)], f"{name}: {record['file_name']}")
            if caption is not None:
                captions[image] = caption
    return captions


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name}: is not UTF-8", field=name, code="unreadable") from None


def _jsonl(data: bytes, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(data, name).split("\n"), start=1):
        if line.strip():
            try:
                record = from_json(line)
            except ValueError as error:
                raise UserError(f"{name} line {number}: not JSON: {error}", field=name, code="unreadable") from None
            if not isinstance(record, dict):
                raise UserError(f"{name} line {number}: not a JSON object", field=name, code="unreadable")
            yield number, record


def _csv(data: bytes, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(data, name), newline=""), strict=True)
    try:
        for record in reader:
            yield reader.line_num, {field: value or None for field, value in record.items() if field}
    except csv.Error as error:
        raise UserError(f"{name} line {reader.line_num}: not CSV: {error}", field=name, code="unreadable") from None
