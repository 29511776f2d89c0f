"""The page of all fields is what the code says."""

from __future__ import annotations

import json
from typing import Any

from ambient_core.parsing import flatten
from tests.conftest import ROOT
from trainer.config.reference import described, groups, page
from trainer.config.run_config import parse, to_data


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == page(), (
        "run: python -m trainer.config.reference > docs/configuration.md"
    )


def test_every_field_has_a_meaning() -> None:
    without = [f"{group.path}.{field.name}" for group in groups() for field in group.fields if not field.about]
    assert without == []


def test_the_defaults_on_it_are_those_of_an_empty_file() -> None:
    config = to_data(parse({"run_dir": "a", "data": {"shards": "b"}}, "here"))
    found: dict[str, Any] = dict(flatten(config))

    def at(path: str) -> Any:
        value: Any = config
        for name in filter(None, path.split(".")):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    shown = {
        f"{group.path}.{field.name}".removeprefix("."): field.default
        for group in groups()
        if isinstance(at(group.path), dict) and group.kind in (None, at(group.path).get("kind"))
        for field in group.fields
    }
    expected = {name: json.dumps(value) for name, value in found.items() if not name.endswith("kind")}
    assert shown.pop("run_dir") == shown.pop("data.shards") == ""
    del expected["run_dir"], expected["data.shards"]
    absent = {name for name in expected if expected[name] == "null"} - shown.keys()  # groups that are off
    assert absent == {group.path for group in groups() if group.null == "default"}
    assert shown == {name: value for name, value in expected.items() if name not in absent}


def test_a_docstring_is_taken_apart_at_the_names_of_fields() -> None:
    from dataclasses import dataclass

    @dataclass
    class Config:
        """What it is.

        a, b: two numbers; c: not this one,
        but d: neither. c: text: as it is.
        """

        a: int
        b: int
        c: str

    about, told = described(Config)
    assert about == "What it is."
    assert told["a"] == told["b"] == "two numbers;"
    assert told["c"] == "text: as it is."
