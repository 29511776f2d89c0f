"""Seeds made from names: stateless (counter-based) random numbers."""

from __future__ import annotations

import hashlib


def address(*parts: object) -> int:
    """A 63-bit seed made of the parts by a cryptographic hash, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
