"""What is wrong with a configuration, in one clear line, from what pydantic says of it."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from ambient_core.arguments import did_you_mean
from ambient_core.errors import Code

PLAINER = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_type": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping of names to values",
    "mapping_type": "must be a mapping of names to values",
}
"""pydantic's messages, in our words."""


def dataclasses_in(kind: Any) -> Iterator[Any]:
    """It and all within it."""
    if dataclasses.is_dataclass(kind):
        yield kind
        for hint in typing.get_type_hints(kind).values():
            yield from dataclasses_in(hint)
    elif typing.get_origin(kind) in (typing.Union, types.UnionType, tuple, dict, list):
        for argument in typing.get_args(kind):
            yield from dataclasses_in(argument)


def explain(kind: Any, error: Any) -> tuple[str, str, Code]:
    """One line of one of pydantic's errors: the field, its value, what it must be, and what may have been meant; the
    field alone; and the kind of mistake. kind: the dataclass that was to be made."""
    text = _line(kind, error)
    return text, re.split("[: ]", text, maxsplit=1)[0], CODES.get(error["type"], "invalid")


CODES: dict[str, Code] = {
    "unexpected_keyword_argument": "unknown",
    "extra_forbidden": "unknown",
    "union_tag_invalid": "unknown",
    "literal_error": "unknown",
    "missing": "missing",
    "missing_argument": "missing",
}
"""By pydantic's types of errors."""


def _line(kind: Any, error: Any) -> str:
    tags = {inner.kind for inner in dataclasses_in(kind) if hasattr(inner, "kind")}
    location = [str(part) for i, part in enumerate(error["loc"]) if not (part in tags and i > 0)]
    name = ".".join(location)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{name}: no such field{_where_it_is(kind, list(map(str, error['loc'])), location)}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{name}: must be given{_one_of(kind, location)}"
    value = error["input"]
    if error["type"] in ("dataclass_type", "model_attributes_type", "union_tag_not_found"):
        known = sorted({field.name for inner in _at(kind, location) for field in dataclasses.fields(inner)})
        return f"{name}: {value!r}: must be a mapping of fields to values; there are {', '.join(known)}"
    if error["type"] == "union_tag_invalid":
        known = re.findall("'(.*?)'", error["ctx"]["expected_tags"])
        return (
            f"{name}.kind: {error['ctx']['tag']!r}: must be one of "
            f"{', '.join(known)}{did_you_mean(error['ctx']['tag'], known)}"
        )
    if error["type"] == "literal_error":
        known = re.findall("'(.*?)'", error["ctx"]["expected"])
        return f"{name}: {value!r}: must be {error['ctx']['expected']}{did_you_mean(value, known)}"
    message = PLAINER[error["type"]] if error["type"] in PLAINER else error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_type" and isinstance(value, int | float):  # which YAML makes of 1 and of yes
        message += ": put it in quotes"
    shown = f" {value!r}:"
    # Of a group: the fields that the message speaks of, where it has not their values.
    if isinstance(value, dict) and error["type"] == "value_error":
        named = [
            field
            for field, its in value.items()
            if not isinstance(its, dict) and re.search(rf"\b{re.escape(str(field))}\b", message)
        ]
        given = [f"{field} {value[field]!r}" for field in named if not _says(message, field, value[field])]
        shown = f" {', '.join(given)}:" if given else ""
    elif dataclasses.is_dataclass(value):
        shown = ""
    said = f"{name}:{shown} {message[0].lower()}{message[1:]}"
    return said if name else said.removeprefix(":").strip()


def _one_of(kind: Any, location: Sequence[str]) -> str:
    """ ": 'slurm' or 'local'" of a field that has a few values with names, else ""."""
    groups = [inner for hint in _at(kind, location[:-1]) for inner in members(hint)]
    hints = [typing.get_type_hints(inner).get(location[-1]) for inner in groups]
    values = [value for hint in hints if typing.get_origin(hint) is typing.Literal for value in typing.get_args(hint)]
    return f": {' or '.join(map(repr, values))}" if values else ""


def _says(message: str, field: str, value: object) -> bool:
    """Whether the message has the field with its value already."""
    texts = {str(value), f"{value:g}" if isinstance(value, int | float) else str(value)}
    return any(re.search(rf"\b{re.escape(f'{field} {text}')}(?![\w.])", message) for text in texts)


def _where_it_is(kind: Any, loc: Sequence[str], location: Sequence[str]) -> str:
    """Of a field that is not where it was looked for. loc: the path, with the kinds that it goes through."""
    last, above = location[-1], ".".join(location[:-1])
    here = sorted({field.name for inner in _at(kind, loc[:-1]) for field in dataclasses.fields(inner)})
    elsewhere = [(path, of) for path, of in _paths(kind) if path.rpartition(".")[2] == last]
    if of := next((of for path, of in elsewhere if of and path == f"{above}.{last}"), None):
        return f"; it is one of kind {of}, which {above}.kind is not"
    if elsewhere:
        return f"; did you mean {' or '.join(dict.fromkeys(path for path, _ in elsewhere[:3]))}?"
    return did_you_mean(last, here) or f"; there are {', '.join(here)}"


def _paths(kind: Any, prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """Every field of a configuration, groups among them, by its path, and of which kind it is where others have it
    not."""
    for inner in members(kind):
        for name, hint in typing.get_type_hints(inner).items():
            yield f"{prefix}{name}", getattr(inner, "kind", None)
            yield from _paths(hint, f"{prefix}{name}.")


def members(hint: Any) -> list[Any]:
    """The dataclasses that a value may be, without those within them. A dict's keys are names that the user gave."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType, typing.Annotated):
        return [inner for argument in typing.get_args(hint) for inner in members(argument)]
    return []


def _at(kind: Any, path: Sequence[str]) -> list[Any]:
    """What may be at a path; a kind that stands in it says which of several it is."""
    hints: list[Any] = [kind]
    for part in path:
        found = [inner for hint in hints for inner in members(hint)]
        if chosen := [inner for inner in found if len(found) > 1 and getattr(inner, "kind", None) == part]:
            hints = chosen
            continue
        dicts = [typing.get_args(hint)[1] for hint in hints if typing.get_origin(hint) is dict]
        hints = dicts or [
            below
            for inner in found
            if (below := typing.get_type_hints(inner, include_extras=True).get(part)) is not None
        ]
    return [inner for hint in hints for inner in members(hint)]
