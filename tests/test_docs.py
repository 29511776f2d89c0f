"""Every command in the README and the docs is one that the commands take: names, options, fields, files, make's
targets."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from tests.conftest import ROOT
from tests.pages import OUR_PROGRAMS, PAGES, commands, inline, run_by, words_of
from trainer import cli
from trainer.config.reference import groups

FIELDS = {f"{group.path}.{field.name}".removeprefix(".") for group in groups() for field in group.fields}
GROUPS = {group.path for group in groups()}

ALL = [(page, command) for page in PAGES for command in (*commands(page), *inline(page))]
OURS = sorted({(page.name, command) for page, command in ALL if re.search(OUR_PROGRAMS, command)})
SCRIPTS = sorted(
    {(page.name, command) for page, command in ALL if re.search(r"python (-m )?(benchmarks|tests)[./]", command)}
)
MADE = sorted({(page.name, command) for page, command in ALL if command.startswith("make ")})


def test_there_are_commands() -> None:
    assert len(OURS) > 45
    assert len(SCRIPTS) > 10
    assert len(MADE) > 5


@pytest.mark.parametrize(("page", "command"), OURS)
def test_a_command_is_taken(page: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = words_of(command)
    if words[0] == "ambient":
        module, words = cli.COMMANDS[words[1]][0], words[2:]
    else:
        at = next(
            i
            for i, word in enumerate(words)
            if word == "-m" and re.match(r"(trainer|data_pipeline|slurm)\b", words[i + 1])
        )
        module, words = words[at + 1], words[at + 2 :]
    words = [word for word in words if word != "..."]
    for word in words:
        if re.match(r"configs/\S+\.yaml$", word):
            assert (ROOT / word).is_file(), f"{page}: {word}"
    for name in [word.partition("=")[0] for word in words if re.match(r"[a-z_.]+=", word)]:
        assert name in FIELDS or name in GROUPS or name.endswith(".kind"), f"{page}: no field {name}"
    if not hasattr(run_by(module), "parser"):
        return
    parser = run_by(module).parser()
    try:
        parser.parse_intermixed_args(words)
    except (SystemExit, TypeError) as error:
        if isinstance(error, TypeError):  # of parsers that cannot take them mixed
            parser.parse_args(words)
        elif error.code:
            pytest.fail(f"{page}: {command}: {capsys.readouterr().err.splitlines()[-1]}")


@pytest.mark.parametrize(("page", "command"), SCRIPTS)
def test_a_script_is_there(page: str, command: str) -> None:
    words = words_of(command)
    name = next(word for word in words if re.match(r"(benchmarks|tests)[./]", word))
    path = ROOT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
    assert path.is_file(), f"{page}: {command}"
    for option in [word.partition("=")[0] for word in words if word.startswith("--")]:
        assert f'"{option}"' in path.read_text() or option == "--quick", f"{page}: {name} has no {option}"


RATIOS = {
    "data": ("summary.images", "summary.latents", "summary.jpeg", "summary.sharding"),
    "step_cost": ("tiny.k1", "tiny.k2"),
    "exactness": ("summary.time_over_every_step", "summary.error_over_every_step"),
}
"""What README's table has of each file in benchmarks/results, in this order."""


def test_the_readmes_table_is_what_was_measured() -> None:
    table = (ROOT / "README.md").read_text().partition("## Comparison")[2].partition("\n## ")[0]
    told = [row.split("|")[3].strip() for row in table.splitlines() if row.startswith("|")][2:]
    measured: list[float] = []
    for name, paths in RATIOS.items():
        assert f"`benchmarks/{name}.py`" in table
        results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        for path in paths:
            group, _, key = path.partition(".")
            measured.append(results[group][key])
    assert told == [f"{value:.2f}" if value < 2 else f"{value:.1f}" for value in measured]


def test_the_table_of_speed_is_what_was_measured() -> None:
    page = (
        (ROOT / "docs" / "performance.md")
        .read_text()
        .partition("## Comparison with other libraries")[2]
        .partition("\n## ")[0]
    )
    told = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")
    ][2:]
    results = json.loads((ROOT / "benchmarks" / "results" / "suite.json").read_text())
    assert [row[:4] for row in told] == [
        [row[name] for name in ("name", "ours", "peer", "theirs")] for row in results["rows"]
    ]
    assert [row[4].split()[0] for row in told] == [f"{row['ratio']:.3f}" for row in results["rows"]]


@pytest.mark.parametrize(("page", "command"), MADE)
def test_make_has_the_target(page: str, command: str) -> None:
    target = shlex.split(command, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{page}: make {target}"
