"""Pictures in columns of parquet files, or of Hugging Face data sets as `save_to_disk` writes them. pyarrow reads them.

The image column is the struct {bytes, path} that `datasets` writes, or plain bytes. `path` is never opened: it names a
file of the person who made the data.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ambient_core import storage
from ambient_core.errors import UserError, one_line
from ambient_core.parsing import from_json
from data_pipeline.format.types import BadImage
from data_pipeline.inputs.captions import FIELDS, caption_in
from data_pipeline.inputs.decode import decode, size_in
from data_pipeline.inputs.picture import PerProcess, Picture, Source, keys_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

KEPT = 2
"""Largest number of parquet row groups, or Arrow files, that a process holds in memory."""


@dataclass(frozen=True)
class Column:
    """The names of the columns of the images and the captions. inside: the image's bytes are the field `bytes` of a
    struct."""

    image: str
    inside: bool
    captions: tuple[str, ...]


class _Kept:
    """A cache of the KEPT parts of a table that were used last."""

    def __init__(self, load: Callable[[int], pa.Table]) -> None:
        self._load = load
        self._parts: OrderedDict[int, pa.Table] = OrderedDict()

    def part(self, number: int) -> pa.Table:
        if number not in self._parts:
            while len(self._parts) >= KEPT:
                self._parts.popitem(last=False)
            self._parts[number] = self._load(number)
        self._parts.move_to_end(number)
        return self._parts[number]


@dataclass(frozen=True)
class Rows:
    """The pictures in the rows of a table. starts: the first row of each part, then the number of all rows. parts:
    reads a part."""

    source: str
    column: Column
    starts: Sequence[int]
    parts: PerProcess[_Kept]

    def picture(self, i: int, size: int | None = None) -> Picture:
        name = f"{self.source}, row {i}"
        part, row, value, data = self._row(i)
        if data is None:
            where = f" (only the path {value['path']!r}, which is not opened)" if value and value.get("path") else ""
            raise BadImage(f"{name}: no bytes in the column {self.column.image}{where}")
        try:
            record = {field: part.column(field)[row].as_py() for field in self.column.captions}
        except UnicodeDecodeError:
            raise BadImage(f"{name}: the caption is not UTF-8") from None
        return Picture(decode(data, name, size), caption_in(record, name))

    def header(self, i: int) -> tuple[int, int] | None:
        data = self._row(i)[3]
        return size_in(data) if data else None

    def _row(self, i: int) -> tuple[Any, int, Any, bytes | None]:
        """Returns the part that has row i, the row's position in it, the value in the image column, and the image's
        bytes."""
        number = bisect_right(self.starts, i) - 1
        part, row = self.parts.get().part(number), i - self.starts[number]
        value = part.column(self.column.image)[row].as_py()  # converts this row only
        return part, row, value, value and value["bytes"] if self.column.inside else value


def open_parquet(source: str, paths: Sequence[str], names: Sequence[str]) -> Source:
    """Returns a source of the rows in parquet files of one schema. names: the names of the files, for the keys: a key
    is the file's name and the row in it."""
    column: Column | None = None
    groups: list[tuple[str, int]] = []
    sizes: list[int] = []
    rows: list[str] = []
    for path, name in zip(paths, names, strict=True):
        with _parquet(path) as file:
            found = _column(file.schema_arrow, f"SOURCE {path}")
            if column not in (None, found):
                raise UserError(
                    f"SOURCE {path}: its columns are not those of {paths[0]}: give them as two sources",
                    field="SOURCE",
                    code="mismatch",
                )
            column = found
            counts = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
        groups += [(path, g) for g in range(len(counts))]
        sizes += counts
        rows += [f"{name.removesuffix('.parquet')}-{row:08d}" for row in range(sum(counts))]
    if column is None or not rows:
        raise UserError(f"SOURCE {source}: no rows in it", field="SOURCE", code="not_found")
    kept = PerProcess(partial(_Kept, partial(_row_group, groups, [column.image, *column.captions])))
    held = Rows(source, column, [0, *accumulate(sizes)], kept)
    return Source(keys_of(source, rows), held.picture, held.header, held.picture)


def open_saved(folder: str) -> Source:
    """Returns a source of the data set that `datasets` saved with `save_to_disk`. Local files are memory-mapped; remote
    files are read completely."""
    try:
        state = from_json(storage.read_bytes(storage.join(folder, "state.json")))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
        mapped = bool(state.get("_indices_data_files"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"SOURCE {folder}: a state.json that cannot be read: {error}", field="SOURCE", code="unreadable"
        ) from None
    if mapped:
        raise UserError(
            f"SOURCE {folder}: saved with a mapping of its rows: call flatten_indices() and save it again",
            field="SOURCE",
            code="unsupported",
        )
    if any("/" in name or "\\" in name for name in names):
        raise UserError(
            f"SOURCE {folder}: state.json names files in other folders: it is not safe",
            field="SOURCE",
            code="unreadable",
        )
    return open_arrow(folder, [storage.join(folder, name) for name in names])


def open_arrow(source: str, paths: Sequence[str]) -> Source:
    """Returns a source of the rows in Arrow files, as one table. A key is the row's number in the complete table."""
    column: Column | None = None
    sizes: list[int] = []
    for path in paths:
        table = _arrow(paths, None, len(sizes))
        found = _column(table.schema, f"SOURCE {path}")
        if column not in (None, found):
            raise UserError(f"SOURCE {path}: its columns are not those of {paths[0]}", field="SOURCE", code="mismatch")
        column = found
        sizes.append(table.num_rows)
    if column is None or not sum(sizes):
        raise UserError(f"SOURCE {source}: no rows in it", field="SOURCE", code="not_found")
    kept = PerProcess(partial(_Kept, partial(_arrow, paths, [column.image, *column.captions])))
    keys = [f"row-{i:08d}" for i in range(sum(sizes))]
    held = Rows(source, column, [0, *accumulate(sizes)], kept)
    return Source(keys, held.picture, held.header, held.picture)


def _column(schema: pa.Schema, name: str) -> Column:
    import pyarrow as pa

    def is_bytes(kind: pa.DataType) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    try:
        names = ", ".join(schema.names)
    except UnicodeDecodeError:
        raise UserError(f"{name}: the columns' names are not UTF-8 (damaged?)", field=name, code="unreadable") from None
    found: dict[str, bool] = {}
    for field in schema:
        if pa.types.is_struct(field.type):
            index = field.type.get_field_index("bytes")
            if index >= 0 and is_bytes(field.type.field(index).type):
                found[field.name] = True
        elif is_bytes(field.type):
            found[field.name] = False
    image = "image" if "image" in found else next(iter(found), None)
    if image is None:
        raise UserError(
            f"{name}: no column of images (bytes, or a struct with bytes) among {names}", field=name, code="invalid"
        )
    if len(found) > 1 and image != "image":
        raise UserError(
            f"{name}: the columns {', '.join(found)} may all be the images: name one of them image",
            field=name,
            code="conflict",
        )
    return Column(image, found[image], tuple(field for field in FIELDS if field in schema.names))


def _parquet(path: str) -> pq.ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    local = storage.local_path(path)
    try:
        return pq.ParquetFile(storage.open_binary(path) if local is None else local)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, "cannot be read as parquet (truncated?)", error) from None


def _row_group(groups: Sequence[tuple[str, int]], columns: list[str], number: int) -> pa.Table:
    import pyarrow as pa

    path, group = groups[number]
    with _parquet(path) as file:
        try:
            return file.read_row_group(group, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, f"row group {group} cannot be read", error) from None


def _arrow(paths: Sequence[str], columns: list[str] | None, number: int) -> pa.Table:
    import pyarrow as pa

    path = paths[number]
    local = storage.local_path(path)
    try:
        data = pa.py_buffer(storage.read_bytes(path)) if local is None else pa.memory_map(str(local)).read_buffer()
        is_file_format = data.slice(0, 6).to_pybytes() == b"ARROW1"
        table = (pa.ipc.open_file(data) if is_file_format else pa.ipc.open_stream(data)).read_all()
    except FileNotFoundError:
        raise UserError(
            f"SOURCE {path}: no such file, though state.json names it", field="SOURCE", code="not_found"
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, "cannot be read as Arrow (truncated?)", error) from None
    return table if columns is None else table.select(columns)


def _unreadable(path: str, what: str, error: Exception) -> Exception:
    """Returns the error to raise. pyarrow raises OSError without a number for data that it cannot parse; an OSError
    with a number comes from the storage."""
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror or str(error), path)
    text = one_line(error, 200)
    return UserError(f"SOURCE {path}: {what}: {text}", field="SOURCE", code="unreadable")
