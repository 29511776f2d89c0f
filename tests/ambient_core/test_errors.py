"""Errors that are answered in one line."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable

import pytest

from ambient_core import errors
from ambient_core.errors import UserError, WorkFailed
from data_pipeline.format.types import BadImage


def raising(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize("error", [UserError("a", field="--size", code="invalid"), BadImage("a", code="unsupported")])
def test_a_worker_can_send_it_to_another_process(error: UserError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.field, again.code) == (str(error), error.field, error.code)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--size 0: must be\nat least 1", field="--size", code="invalid"), 2, "error: --size 0: must be at"),
        (WorkFailed("the disk\u202e is full"), 1, "failed: the disk\\u202e is full"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "failed: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "a.tar"), 1, "failed: a.tar: Permission denied"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_each_is_one_line_and_an_exit_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert errors.run(raising(error)) == code
    printed = capsys.readouterr().err
    assert printed.startswith(line)
    assert printed.count("\n") == 1


def test_what_is_nobodys_mistake_keeps_its_traceback() -> None:
    with pytest.raises(OSError, match="nothing that a disk says"):
        errors.run(raising(OSError("nothing that a disk says")))
    with pytest.raises(KeyError):
        errors.run(raising(KeyError("a fault of ours")))
