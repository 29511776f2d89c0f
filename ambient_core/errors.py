"""Errors that are reported in one line, and the exit codes of all commands."""

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
"""Error numbers of disks and file systems. Such an error needs no traceback, even if it names no file."""


class OneLineError(Exception):
    """An error whose message is for the user."""

    def __str__(self) -> str:
        """Returns the message in one line. Characters that are not printable (from file names or values) are escaped,
        so that any terminal can print the line."""
        line = " ".join(super().__str__().splitlines())
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


Code = Literal[
    "missing",  # a required value was not given
    "unknown",  # a name that does not exist
    "invalid",  # a value of the wrong kind, form or range
    "conflict",  # cannot be combined with another given value
    "mismatch",  # valid by itself, but its size or kind differs from that of the data, the model or an earlier call
    "not_found",  # a file, a folder, or a part of one does not exist
    "unreadable",  # a file is damaged, or not of the expected format
    "unwritable",
    "in_use",  # a path that holds something else, or that another process writes to
    "unsupported",  # valid, but this program cannot use it
    "dependency",  # a package or a program is not installed
]
"""The kind of mistake that a UserError reports."""


class UserError(OneLineError):
    """The request cannot be carried out. The message names the field or file, its value, and what to do, in one line.

    field: what to change: an option such as --sigma, a field such as optimizer.lr, an argument such as SOURCE, or a
    path. code: the kind of mistake. Programs and tests can use both instead of reading the message."""

    def __init__(self, text: str, *, field: str | os.PathLike[str], code: Code) -> None:
        super().__init__(text)
        self.field = os.fspath(field)
        self.code: Code = code

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes the error picklable: workers send their errors to the process that waits for them."""
        return partial(type(self), field=self.field, code=self.code), self.args


class WorkFailed(OneLineError):
    """The request was valid, but the work failed, for a reason that one line explains."""


def one_line(error: BaseException, most: int | None = None, with_kind: bool = False) -> str:
    """Returns the message of any error in one line, or the name of the error's type if the message is empty.

    most: the maximum number of characters of the message. with_kind: put the name of the type before the message."""
    text, kind = " ".join(str(error).split())[:most], type(error).__name__
    return f"{kind}: {text}" if with_kind and text else text or kind


def differences(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    """Returns a text such as `seed=0, not 1; size=32, not 64`: the first three entries that differ, and the number of
    the others. Returns "" if none differ."""
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    parts = [f"{name}={old.get(name)}, not {new.get(name)}" for name in names[:3]]
    return "; ".join(parts) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def run(main: Callable[[], int]) -> int:
    """Runs a command's main function and returns the exit code. Errors meant for the user become one line on stderr."""
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
