"""JSON, YAML and addresses that came from elsewhere: whatever is wrong with them is a ValueError, in one line."""

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
    """What a file says. Raises OSError, ValueError for what is not UTF-8, or so long that it would fill the memory."""
    if (size := path.stat().st_size) > LONGEST:
        raise ValueError(f"it has {size >> 20} MiB, and no such file has more than {LONGEST >> 20}")
    return path.read_text(encoding="utf-8")


def from_json(text: str | bytes) -> Any:
    """Raises ValueError, also for text that is nested too deeply and for whole numbers of more than 64 bits, which what
    reads them would stumble over later."""
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_lines(path: Path) -> Iterator[Any]:
    """The values in the lines of a file, one after the other; a line that a kill has cut is skipped, and a file
    that is not there has none."""
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                with suppress(ValueError):
                    yield from_json(line)


def from_yaml(text: str) -> Any:
    """Plain data: YAML's tags make no objects, and its aliases, by which a short text can be a large or an endless
    one, are refused. Raises ValueError."""

    try:
        if "*" in text and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader)):
            raise ValueError("it has an alias (*name): write out what it stands for")
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except Exception as error:  # PyYAML has errors of its own, and lets those of its insides through
        raise ValueError(one_line(error)) from None


def read_mapping(path: Path, language: Literal["JSON", "YAML"], where: str) -> dict[str, Any]:
    """A file of fields and values. where: what errors name, such as the path. Raises UserError."""
    try:
        data = (from_json if language == "JSON" else from_yaml)(text_of(path))
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}", field=path, code="unreadable") from None
    except ValueError as error:  # also where it is not UTF-8
        raise UserError(f"{where}: not {language}: {one_line(error)}", field=path, code="unreadable") from None
    if not isinstance(data, dict):
        raise UserError(f"{where}: must be a mapping of fields to values", field=path, code="unreadable")
    return data


def _whole(digits: str) -> int:
    number = int(digits)
    if not -LARGEST <= number < LARGEST:
        raise ValueError(f"{digits[:20]}... has more than 64 bits")
    return number


_DECODER = json.JSONDecoder(parse_int=_whole)
"""json.loads would make one for each of a data set's samples, which takes as long as reading it."""

PASSWORD = re.compile(r"(://[^/@:]*:)[^/@]+@")


def refuse_password(address: str) -> None:
    """Addresses are written to logs, to MLflow and next to data. Raises ValueError, without the password in it."""
    if PASSWORD.search(address):
        masked = PASSWORD.sub(r"\1***@", address)
        raise ValueError(
            f"{masked} has a password in it, which would be logged: leave it out, and give it by the "
            "environment or the configuration of fsspec or MLflow"
        )


def flatten(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("optimizer.lr", 0.001), ...: every leaf by its path."""
    for name, value in data.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """high over low. A mapping that names another `kind` replaces the one below it, whose fields would not fit."""
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
