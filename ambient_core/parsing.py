"""JSON, YAML and addresses from outside the program. Whatever is wrong with them raises a ValueError of one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import yaml

from ambient_core.errors import UserError, one_line

LARGEST = 2**63
LONGEST = 1 << 28
"""Largest size, in bytes, of a text file that is read."""


def text_of(path: Path) -> str:
    """Returns the text of a file. Raises OSError, and ValueError if the file is not UTF-8 or is larger than LONGEST: it
    would fill the memory."""
    if (size := path.stat().st_size) > LONGEST:
        raise ValueError(f"it has {size >> 20} MiB; at most {LONGEST >> 20} MiB are read")
    return path.read_text(encoding="utf-8")


def from_json(text: str | bytes) -> Any:
    """Returns the value of a JSON text. Raises ValueError, also for text that is nested too deeply, and for integers of
    more than 64 bits: code that uses them would fail later."""
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_lines(path: Path) -> Iterator[Any]:
    """Yields the value of each line of a JSON-lines file. Invalid lines, such as one that a killed process has cut, are
    skipped. A missing file yields nothing."""
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                with suppress(ValueError):
                    yield from_json(line)


def from_yaml(text: str) -> Any:
    """Returns the plain data of a YAML text. Tags create no objects. Aliases are refused, because with them a short
    text can describe very large or endless data. Raises ValueError."""

    try:
        if "*" in text and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
            raise ValueError("it has an alias (*name): write out what it stands for")
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # PyYAML raises errors of its own types, and lets internal errors through
        raise ValueError(one_line(error)) from None


def read_mapping(path: Path, language: Literal["JSON", "YAML"], where: str) -> dict[str, Any]:
    """Returns the fields and values of a file. where: the file's name in error messages, such as its path. Raises
    UserError."""
    try:
        data = (from_json if language == "JSON" else from_yaml)(text_of(path))
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}", field=path, code="unreadable") from None
    except ValueError as error:  # also if the file is not UTF-8
        raise UserError(f"{where}: not {language}: {one_line(error)}", field=path, code="unreadable") from None
    if not isinstance(data, dict):
        raise UserError(f"{where}: must be a mapping of fields to values", field=path, code="unreadable")
    return data


def _integer(digits: str) -> int:
    number = int(digits)
    if not -LARGEST <= number < LARGEST:
        raise ValueError(f"{digits[:20]}... has more than 64 bits")
    return number


_DECODER = json.JSONDecoder(parse_int=_integer)
"""One decoder for all calls. json.loads would make one for each sample of a data set, which takes as long as reading
the sample."""

PASSWORD = re.compile(r"(://[^/@:]*:)[^/@]+@")


def refuse_password(address: str) -> None:
    """Raises ValueError for an address with a password: addresses are written to logs, to MLflow and next to data. The
    message does not contain the password."""
    if PASSWORD.search(address):
        masked = PASSWORD.sub(r"\1***@", address)
        raise ValueError(
            f"{masked} has a password in it, which would be logged: leave it out, and give it in the "
            "environment or in the configuration of fsspec or MLflow"
        )


def flatten(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every leaf with its path, such as ("optimizer.lr", 0.001)."""
    for name, value in data.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Returns `low`, updated recursively with the values of `high`. A mapping in `high` that names another `kind`
    replaces the mapping in `low`, whose fields would not fit."""
    merged = dict(low)
    for name, value in high.items():
        below = merged.get(name)
        if (
            isinstance(below, dict)
            and isinstance(value, dict)
            and value.get("kind", below.get("kind")) == below.get("kind")
        ):
            merged[name] = merge(below, value)
        else:
            merged[name] = value
    return merged
