"""Explains what is wrong with a configuration in one line, based on pydantic's error."""

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
"""Plainer texts for pydantic's messages, by its type of error."""


def dataclasses_in(kind: Any) -> Iterator[Any]:
    """Yields the dataclasses in a type: itself, and those of its fields at any depth."""
    if dataclasses.is_dataclass(kind):
        yield kind
        for hint in typing.get_type_hints(kind).values():
            yield from dataclasses_in(hint)
    elif typing.get_origin(kind) in (typing.Union, types.UnionType, tuple, dict, list):
        for argument in typing.get_args(kind):
            yield from dataclasses_in(argument)


def explain(kind: Any, error: Any) -> tuple[str, str, Code]:
    """Returns (line, field, code) for one of pydantic's errors. The line names the field, its value, what it must be,
    and what the user may have meant. kind: the dataclass that should have been made."""
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
"""The codes of mistakes by pydantic's type of error. All other types are "invalid"."""


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
    if error["type"] == "string_type" and isinstance(value, int | float):  # as YAML reads 1 and yes
        message += ": put it in quotes"
    shown = f" {value!r}:"
    # For a group: the fields that the message names without their values.
    if isinstance(value, dict) and error["type"] == "value_error":
        named = [
            field
            for field, inner in value.items()
            if not isinstance(inner, dict) and re.search(rf"\b{re.escape(str(field))}\b", message)
        ]
        given = [f"{field} {value[field]!r}" for field in named if not _says(message, field, value[field])]
        shown = f" {', '.join(given)}:" if given else ""
    elif dataclasses.is_dataclass(value):
        shown = ""
    line = f"{name}:{shown} {message[0].lower()}{message[1:]}"
    return line if name else line.removeprefix(":").strip()


def _one_of(kind: Any, location: Sequence[str]) -> str:
    """Returns ": 'slurm' or 'local'" for a field with a fixed list of values, otherwise ""."""
    groups = [inner for hint in _at(kind, location[:-1]) for inner in members(hint)]
    hints = [typing.get_type_hints(inner).get(location[-1]) for inner in groups]
    values = [value for hint in hints if typing.get_origin(hint) is typing.Literal for value in typing.get_args(hint)]
    return f": {' or '.join(map(repr, values))}" if values else ""


def _says(message: str, field: str, value: object) -> bool:
    """Returns whether the message already contains the field with its value."""
    texts = {str(value), f"{value:g}" if isinstance(value, int | float) else str(value)}
    return any(re.search(rf"\b{re.escape(f'{field} {text}')}(?![\w.])", message) for text in texts)


def _where_it_is(kind: Any, loc: Sequence[str], location: Sequence[str]) -> str:
    """Returns a hint for an unknown field. loc: its path, including the kinds in it. location: its path without
    them."""
    last, above = location[-1], ".".join(location[:-1])
    here = sorted({field.name for inner in _at(kind, loc[:-1]) for field in dataclasses.fields(inner)})
    elsewhere = [(path, of) for path, of in _paths(kind) if path.rpartition(".")[2] == last]
    if of := next((of for path, of in elsewhere if of and path == f"{above}.{last}"), None):
        return f"; it is a field of kind {of}, but {above}.kind is another one"
    if elsewhere:
        return f"; did you mean {' or '.join(dict.fromkeys(path for path, _ in elsewhere[:3]))}?"
    return did_you_mean(last, here) or f"; there are {', '.join(here)}"


def _paths(kind: Any, prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """Yields (path, kind) of every field of a configuration, including groups. kind: the kind of group that has the
    field; None for a group without kinds."""
    for inner in members(kind):
        for name, hint in typing.get_type_hints(inner).items():
            yield f"{prefix}{name}", getattr(inner, "kind", None)
            yield from _paths(hint, f"{prefix}{name}.")


def members(hint: Any) -> list[Any]:
    """Returns the dataclasses that a value may be, without those nested in them. For a dict there are none: its keys
    are names that the user gave."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType, typing.Annotated):
        return [inner for argument in typing.get_args(hint) for inner in members(argument)]
    return []


def _at(kind: Any, path: Sequence[str]) -> list[Any]:
    """Returns the dataclasses that may be at a path. A kind in the path selects one of several."""
    hints: list[Any] = [kind]
    for part in path:
        possible = [inner for hint in hints for inner in members(hint)]
        if chosen := [inner for inner in possible if len(possible) > 1 and getattr(inner, "kind", None) == part]:
            hints = chosen
            continue
        dicts = [typing.get_args(hint)[1] for hint in hints if typing.get_origin(hint) is dict]
        hints = dicts or [
            below
            for inner in possible
            if (below := typing.get_type_hints(inner, include_extras=True).get(part)) is not None
        ]
    return [inner for hint in hints for inner in members(hint)]
