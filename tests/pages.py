"""What stands in README and the docs, and how a test calls it: the commands of a page, made shorter, in this
process."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ambient_core import errors
from tests.conftest import ROOT
from trainer import cli

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted((ROOT / "docs").glob("*.md"))
OUR_PROGRAMS = rf"-m (trainer|data_pipeline|slurm)\b|^ambient ({'|'.join(cli.COMMANDS)})\b"

FEWER = {
    r'load\("digits", part\)': 'load("digits", part)[:80]',
    r"steps=\d+": "steps=3",
    r"--number \d+": "--number 12",
    r"--limit \d+": "--limit 20",
    r"num_inference_steps=\d+": "num_inference_steps=2",
}


def commands(page: Path) -> Iterator[str]:
    """What stands in a page's blocks of code, one command a line, without comments."""
    fenced, text = False, ""
    for line in page.read_text().splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            text += line.strip()
            if text.endswith("\\"):
                text = text[:-1] + " "
                continue
            yield text
            text = ""


def words_of(command: str) -> list[str]:
    """Of the last program in a line, from its name on."""
    try:
        words = shlex.split(command.replace("[", "").replace("]", ""), comments=True)
    except ValueError:
        return []
    for operator in ("&&", "|", ";"):
        if operator in words:
            words = words[words.index(operator) + 1 :]
    return words


def inline(page: Path) -> Iterator[str]:
    """Commands within a page's sentences and tables; of ours, not those that are but named, without their words."""
    for found in re.finditer(r"`((?:torchrun|python|ambient) [^`]+)`", page.read_text()):
        if not re.search(OUR_PROGRAMS, found[1]) or len(words_of(found[1])) > 3:
            yield found[1]


def less(text: str) -> str:
    for long, short in FEWER.items():
        text = re.sub(long, short, text)
    return text


def run_by(name: str) -> ModuleType:
    """The module that `python -m NAME` runs: of a package its `__main__`."""
    module = import_module(name)
    return import_module(f"{name}.__main__") if hasattr(module, "__path__") else module


def called(words: list[str]) -> None:
    """`python -m MODULE WORDS...`, in this process, which saves the imports; samples by a few steps."""
    if words[2] == "trainer.sample" and "--steps" not in words:
        words = [*words, "--steps", "2"]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    module = run_by(words[2])
    try:
        code = errors.run(lambda: module.main(words[3:]))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert code == 0, words
