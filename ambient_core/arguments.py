"""The argument parser of every command."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from ambient_core.errors import BAD_REQUEST


class Parser(argparse.ArgumentParser):
    """A command's words. What is wrong with them is said in one line, and none is taken for another that it begins."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_REQUEST, f"error: {message}{self._meant(message)}; see {self.prog} --help\n")

    def _meant(self, message: str) -> str:
        if found := re.match(r"unrecognized arguments: (--[^ =]+)", message):
            return did_you_mean(found[1], self._option_string_actions)
        if found := re.match(r"argument (\S+): invalid choice: '(.*?)'", message):
            choices = next((a.choices for a in self._actions if found[1] in (a.dest, "/".join(a.option_strings))), None)
            return did_you_mean(found[2], map(str, choices or ()))
        return ""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """ "; did you mean lr?" where one of the known words is like this one, else "". In what case letters are makes no
    difference."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), by_lower, 1)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


def giving(words: Iterable[str], *options: str) -> str | None:
    """The first of a command's words that gives one of these options, as `--option` or `--option=value`."""
    return next((word for word in words if word.partition("=")[0] in options), None)
