"""The error of one image that cannot be used, while the others can."""

from __future__ import annotations


class BadImage(Exception):
    """The message is the reason, in one line, without the image's name."""
