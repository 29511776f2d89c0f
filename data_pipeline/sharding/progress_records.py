"""Records which shards are finished, in a file next to each (`shard-000000.json`), and merges the records into the
index when all shards are finished."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ambient_core import storage
from ambient_core.errors import UserError, WorkFailed, one_line
from ambient_core.parsing import from_json
from data_pipeline.format import index
from data_pipeline.format.index import REJECTED, Shard, ShardIndex
from data_pipeline.format.writer import META, OBSERVATION
from data_pipeline.latents.caption_embeddings import FOLDER as TEXT
from data_pipeline.sharding import plan
from data_pipeline.sharding.plan import Plan

OWN = re.compile(
    rf"shard-\d{{6,}}\.(tar|json)|{re.escape(plan.NAME)}|{re.escape(index.NAME)}|{re.escape(REJECTED)}|\..*\.partial|inspect/.*|{TEXT}/.*"
)
"""The files of a folder of shards. Any other file means that the folder is used for something else."""


@dataclass(frozen=True)
class Rejected:
    """An image that cannot be used. reason: why, in one line."""

    key: str
    reason: str

    @classmethod
    def of(cls, key: str, error: Exception) -> Rejected:
        return cls(key, one_line(error))


@dataclass(frozen=True)
class Record:
    """One finished shard. number: its number in the plan. shard: None if all its images were rejected. sigma_min and
    sigma_max: the range of its sigma_n. fields: the fields of the samples' JSON. rejected: in the source's order.
    captions: with latents, the shard's distinct captions, in the order of their first use. enlarged: the number of
    images that had fewer pixels than the requested size. captioned: the number of samples that have a caption."""

    number: int
    shard: Shard | None
    sigma_min: float
    sigma_max: float
    fields: tuple[str, ...]
    rejected: tuple[Rejected, ...]
    captions: tuple[str, ...] = ()
    enlarged: int = 0
    captioned: int = 0

    @property
    def images(self) -> int:
        return (self.shard.samples if self.shard else 0) + len(self.rejected)


def write_record(output: str, record: Record) -> None:
    """Writes the record of a shard. It is written after the tar, so a shard that has a record is complete."""
    storage.write_atomically(_path(output, record.number), json.dumps(asdict(record)).encode())


def read_record(output: str, number: int) -> Record:
    path = _path(output, number)
    try:
        data = from_json(storage.read_bytes(path))
        shard = Shard(**data.pop("shard")) if data["shard"] else data.pop("shard")
        rejected = tuple(Rejected(**entry) for entry in data.pop("rejected"))
        captions, fields = tuple(data.pop("captions", ())), tuple(data.pop("fields"))
        return Record(shard=shard, rejected=rejected, fields=fields, captions=captions, **data)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: not a shard's record ({type(error).__name__}): remove it, and run again",
            field=path,
            code="unreadable",
        ) from None


def _path(output: str, number: int) -> str:
    return storage.join(output, plan.name_of(number).replace(".tar", ".json"))


def names_in(output: str) -> list[str]:
    return storage.list_files(output) if storage.is_folder(output) else []


def recorded(names: Iterable[str]) -> set[int]:
    """Returns the numbers of the shards whose records are among the file names."""
    return {int(name[6:-5]) for name in names if name.startswith("shard-") and name.endswith(".json")}


def finished(output: str, wanted: Iterable[int]) -> dict[int, Record]:
    """Returns the records of the wanted shards that are finished: the record exists and, unless all images were
    rejected, the tar does, too."""
    names, remote = set(names_in(output)), storage.local_path(output) is None  # an upload is complete or absent
    done: dict[int, Record] = {}
    for number in sorted(recorded(names) & set(wanted)):
        record = read_record(output, number)
        shard = record.shard
        path = storage.join(output, shard.name) if shard else ""
        if not shard or (shard.name in names and (remote or storage.size_of(path) == shard.bytes)):
            done[number] = record
    return done


def refuse_other_files(output: str) -> None:
    """Raises UserError for a folder with any file that an interrupted call does not leave."""
    names = names_in(output)
    begun = plan.NAME in names
    for name in names:
        if not OWN.fullmatch(name) or (not begun and name.startswith("shard-")):
            raise UserError(
                f"OUTPUT {output}: the folder holds other files, such as {name}: choose a new one",
                field="OUTPUT",
                code="in_use",
            )


def remove_leftovers(output: str, done: Iterable[int]) -> None:
    """Removes what a killed call left: partial files, and shards without a record."""
    kept = {plan.name_of(number) for number in done}
    for name in names_in(output):
        if name.startswith(f"{TEXT}/"):  # the text cache handles its own partial files
            continue
        if name.endswith(".partial") or (name.startswith("shard-") and name.endswith(".tar") and name not in kept):
            storage.remove(storage.join(output, name))


def write_rejected(output: str, rejected: Iterable[Rejected]) -> None:
    """Writes `rejected.jsonl`, a line per image, or removes it if no image was rejected."""
    lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in rejected)
    path = storage.join(output, REJECTED)
    if lines:
        storage.write_atomically(path, lines.encode())
    else:
        storage.remove(path)


def merge(output: str, work: Plan, records: Iterable[Record], text: dict[str, Any] | None = None) -> ShardIndex:
    """Writes `rejected.jsonl` and then the index, and returns the index. text: what the index records about the text
    cache. Raises WorkFailed if all images were rejected."""
    ordered = sorted(records, key=lambda record: record.number)
    assert len(ordered) == work.shards, "all shards must be finished"
    rejected = [entry for record in ordered for entry in record.rejected]
    write_rejected(output, rejected)
    filled = [record for record in ordered if record.shard]
    if not filled:
        raise WorkFailed(f"{output}: all {len(rejected)} images were rejected: see {storage.join(output, REJECTED)}")
    fields = sorted({field for record in filled for field in record.fields})
    shards = [record.shard for record in filled if record.shard]
    used = sorted({shard.shape for shard in shards})
    shapes = [work.shapes[shape] for shape in used]
    merged = ShardIndex(
        shards=tuple(replace(shard, shape=used.index(shard.shape)) for shard in shards),
        shapes=tuple(shapes),
        sigma_min=min(record.sigma_min for record in filled),
        sigma_max=max(record.sigma_max for record in filled),
        request=work.request,
        schema={
            OBSERVATION: {"dtype": "float16", "shapes": [list(shape) for shape in shapes]},
            META: {"fields": fields},
        },
        rejected=len(rejected),
        text=text,
        keys=work.keys,
    )
    index.write_index(output, merged)
    clean_up(output)
    return merged


def clean_up(output: str) -> None:
    """Removes the records and the plan. The index holds their contents, and 100,000 small files would slow down every
    listing. The plan is removed last: while it exists, a later call knows that there is something to remove."""
    for number in sorted(recorded(names_in(output))):
        storage.remove(_path(output, number))
    storage.remove(storage.join(output, plan.NAME))
