"""The argument parser of every command."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from ambient_core.errors import BAD_REQUEST


class Parser(argparse.ArgumentParser):
    """The argument parser of a command. It reports an error in one line, and does not accept abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_REQUEST, f"error: {message}{self._suggestion(message)}; see {self.prog} --help\n")

    def _suggestion(self, message: str) -> str:
        if match := re.match(r"unrecognized arguments: (--[^ =]+)", message):
            return did_you_mean(match[1], self._option_string_actions)
        if match := re.match(r"argument (\S+): invalid choice: '(.*?)'", message):
            choices = next((a.choices for a in self._actions if match[1] in (a.dest, "/".join(a.option_strings))), None)
            return did_you_mean(match[2], map(str, choices or ()))
        return ""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Returns a suggestion such as "; did you mean lr?" if a known word resembles `word`, otherwise "". Upper and
    lower case are not distinguished."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), by_lower, 1)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


def giving(words: Iterable[str], *options: str) -> str | None:
    """Returns the first of a command's arguments that gives one of these options, as `--option` or `--option=value`;
    None if there is none. words: the command's arguments."""
    return next((word for word in words if word.partition("=")[0] in options), None)
