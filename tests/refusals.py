"""What a user's mistake is answered with, by its field and code: so that messages can be reworded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePath

import pytest

from ambient_core import errors
from ambient_core.errors import Code, UserError

Refusal = tuple[str, Code]
"""The field, of a path or an address its last part; and the code."""


def refusal_of(error: UserError) -> Refusal:
    """Of an error whose message is one line."""
    assert "\n" not in str(error)
    return PurePath(error.field).name if os.path.isabs(error.field) else error.field, error.code


@contextmanager
def refused(field: str, code: Code) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """What is done in the block is refused."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert refusal_of(caught.value) == (field, code), caught.value


_last: list[UserError] = []


def run(main: Callable[[], int]) -> int:
    """As errors.run; what it refused is kept for `refusal`."""
    _last.clear()

    def watched() -> int:
        try:
            return main()
        except UserError as error:
            _last.append(error)
            raise

    return errors.run(watched)


def refusal() -> Refusal:
    """Of the last `run`."""
    assert _last, "nothing was refused"
    return refusal_of(_last[0])
