"""Errors that are answered in one line, and the exit codes of every command."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

DONE, FAILED, BAD_REQUEST, INTERRUPTED = 0, 1, 2, 75
"""0 done; 1 the work failed; 2 the request was wrong; 75 interrupted with a checkpoint saved: run again to resume."""

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
"""Of errors that come from a disk, and need no traceback even where they do not say of which file they speak."""


class OneLineError(Exception):
    """An error whose message is for the user."""

    def __str__(self) -> str:
        """In one line, and such that any terminal can print it, whatever names of files and values are in it."""
        line = " ".join(super().__str__().splitlines())
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


Code = Literal[
    "missing",  # must be given, and is not
    "unknown",  # a name that is none of those that there are
    "invalid",  # a value of the wrong kind, form or range
    "conflict",  # does not go together with what else was given
    "mismatch",  # right by itself, but of another size or kind than the data, the model or an earlier call has
    "not_found",  # a file, a folder, or a part of one, that is not there
    "unreadable",  # a file that is damaged, or not of its format
    "unwritable",
    "in_use",  # a place that holds something else, or that another process writes
    "unsupported",  # good, but not what this program can use
    "dependency",  # a package or a program that is not installed
]
"""What kind of mistake a UserError is."""


class UserError(OneLineError):
    """The request cannot be met. The message names the field or file, its value, and what to do, in one line.

    field: what to change: an option such as --sigma, a field such as optimizer.lr, an argument such as SOURCE, or a
    path. code: the kind of mistake. For programs and tests, which need not read the message."""

    def __init__(self, text: str, *, field: str | os.PathLike[str], code: Code) -> None:
        super().__init__(text)
        self.field = os.fspath(field)
        self.code: Code = code

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers send their errors to the process that waits for them."""
        return partial(type(self), field=self.field, code=self.code), self.args


class WorkFailed(OneLineError):
    """The request was right and the work failed, for a reason that one line explains."""


def one_line(error: BaseException, most: int | None = None, with_kind: bool = False) -> str:
    """What somebody else's error says, or, where it says nothing, what it is. most: characters. with_kind: what it
    is, too."""
    text, kind = " ".join(str(error).split())[:most], type(error).__name__
    return f"{kind}: {text}" if with_kind and text else text or kind


def differences(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """`seed=0, not 1; size=32, not 64`, of the entries that differ; the first three, and how many more. "" for none."""
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    said = [f"{name}={old.get(name)}, not {new.get(name)}" for name in names[:3]]
    return "; ".join(said) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def run(main: Callable[[], int]) -> int:
    """Runs a command's main; errors meant for the user become one line on stderr and an exit code."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_REQUEST
    except WorkFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:  # a full disk, a folder without permission
        if error.filename is None and error.errno not in DISK:
            raise
        print(f"failed: {f'{error.filename}: ' if error.filename else ''}{error.strerror}", file=sys.stderr)
        return FAILED
