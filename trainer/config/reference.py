"""The reference of all configuration fields, with values, default and meaning, made from the dataclasses.

python -m trainer.config.reference > docs/configuration.md
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

from ambient_core import errors
from data_pipeline.loading.config import DataConfig
from trainer.config.messages import members
from trainer.config.run_config import RunConfig

HEAD = """# Every field of a configuration

A configuration is a YAML file of these fields. `key.path=value` on the command line replaces one
(`optimizer.lr=3e-4`), and `base: other.yaml` takes the rest from a file in the same folder. If a group has a `kind`,
the other fields depend on it. The fields marked with ↻ may change when a run is resumed.

This page is made by `python -m trainer.config.reference`, from the code.
"""


@dataclass(frozen=True)
class Field:
    """One field. name: its name within the group. values: the allowed values, in words. choices: those of its values
    that have a name, such as true and null. default: as YAML; "" if the field must be given. about: its meaning."""

    name: str
    values: str
    choices: tuple[str, ...]
    default: str
    about: str


@dataclass(frozen=True)
class Group:
    """The fields at one path of the configuration, such as engine or checkpoint.keep_best; "" at the top. kind: the
    kind that these fields belong to, if the path has several kinds. null: whether the group may be null: "no",
    "allowed" or "default"."""

    path: str
    kind: str | None
    null: str
    about: str
    fields: tuple[Field, ...]


def groups(configs: Sequence[Any] = (RunConfig,), path: str = "", null: str = "no") -> Iterator[Group]:
    """Yields groups in the order of the configuration, each before those nested in it. configs: the dataclasses that
    may be at this path."""
    below: dict[str, list[Any]] = {}
    nulls: dict[str, str] = {}
    for config in configs:
        hints = typing.get_type_hints(config)
        about, descriptions = described(config)
        named = [f for f in dataclasses.fields(config) if f.name != "kind"]
        below |= {f.name: parts for f in named if (parts := members(hints[f.name]))}
        for f in named:
            if "null" in _choices(hints[f.name]):
                nulls[f.name] = "default" if f.default is None else "allowed"
        leaves = [
            Field(
                f.name,
                _values(hints[f.name]),
                tuple(_choices(hints[f.name])),
                _default(f),
                descriptions.get(f.name, ""),
            )
            for f in named
            if f.name not in below
        ]
        yield Group(path, config.kind if len(configs) > 1 else None, null, about, tuple(leaves))
    for name, parts in below.items():
        yield from groups(parts, f"{path}.{name}".removeprefix("."), nulls.get(name, "no"))


def described(config: Any) -> tuple[str, dict[str, str]]:
    """Returns what a dataclass's docstring says about it, and about each of its fields. The docstring describes fields
    as `name: meaning` or `name, other: meaning`."""
    text = " ".join((inspect.getdoc(config) or "").split())
    names = "|".join(f.name for f in dataclasses.fields(config))
    first, *rest = re.split(rf"(?:^|(?<=[.;] ))((?:{names})(?:, (?:{names}))*): ", text)
    descriptions = {
        name: about.strip()
        for together, about in zip(rest[::2], rest[1::2], strict=True)
        for name in together.split(", ")
    }
    return first.strip(), descriptions


def _values(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _values(arguments[0])
    if origin is typing.Literal:
        return ", ".join(str(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_values(argument) for argument in arguments)
    if origin in (list, tuple):
        inner = [argument for argument in arguments if argument is not ...]
        each = _values(inner[0])
        return f"list of {each}{'' if ',' in each else 's'}" if len(set(inner)) == 1 else "list"
    return {int: "integer", float: "number", str: "text", bool: "true, false", types.NoneType: "null"}[hint]


def _choices(hint: Any) -> Iterator[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        yield from map(str, arguments)
    elif origin is typing.Annotated:
        yield from _choices(arguments[0])
    elif origin in (typing.Union, types.UnionType):
        for argument in arguments:
            yield from _choices(argument)
    else:
        yield from {bool: ("true", "false"), types.NoneType: ("null",)}.get(hint, ())


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not MISSING:
        return json.dumps(field.default)
    if field.default_factory is not MISSING:
        return json.dumps(field.default_factory())
    return ""


def page() -> str:
    """Returns the complete reference in Markdown."""
    from trainer.config.resume_compatibility import MAY_CHANGE

    all_groups = list(groups())
    lines, before = [HEAD], None
    for group in all_groups:
        if group.path != before:
            lines.append(f"\n## {group.path or 'The run'}\n")
            if group.kind:
                kinds = ", ".join(str(other.kind) for other in all_groups if other.path == group.path)
                lines.append(f"\n`{group.path}.kind`: one of {kinds}; `{_default_kind(group.path)}` unless given.\n")
        if group.null != "no" and group.path != before:
            lines.append(
                f"\n`{group.path}: null`{', the default,' if group.null == 'default' else ''} leaves it out.\n"
            )
        if group.kind:
            lines.append(f"\n### {group.path} of kind {group.kind}\n")
        lines += [f"\n{group.about}\n"] if group.about else []
        if group.fields:
            lines.append("\n| field | values | default | meaning |\n|---|---|---|---|\n")
        for field in group.fields:
            path = f"{group.path}.{field.name}".removeprefix(".")
            mark = " ↻" if path.startswith(MAY_CHANGE) else ""
            cells = (
                f"`{path}`{mark}",
                field.values,
                f"`{field.default}`" if field.default else "must be given",
                field.about,
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
        before = group.path
    return "".join(lines)


def _default_kind(path: str) -> str | None:
    config: Any = RunConfig("", DataConfig(""))
    for name in filter(None, path.split(".")):
        config = getattr(config, name, None)
    return getattr(config, "kind", None)


def main(argv: list[str] | None = None) -> int:
    if argv or (argv is None and sys.argv[1:]):
        raise errors.UserError("takes no arguments: it prints docs/configuration.md", field="arguments", code="unknown")
    print(page(), end="")
    return errors.DONE


if __name__ == "__main__":
    sys.exit(errors.run(main))
