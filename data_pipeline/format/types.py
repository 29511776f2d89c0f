"""The error for one image that cannot be used, and the type of image arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ambient_core.errors import Code, UserError


class BadImage(UserError):
    """ONE picture cannot be read or used. The message is the reason, in one line that is the same in every run.

    It is a UserError, so that it is reported in one line if no caller skips the picture."""

    def __init__(self, text: str, *, field: str = "SOURCE", code: Code = "unreadable") -> None:
        super().__init__(text, field=field, code=code)


Array = NDArray[np.float32]
