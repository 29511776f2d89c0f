"""Seeds made from names, for stateless (counter-based) random numbers."""

from __future__ import annotations

import hashlib


def address(*parts: object) -> int:
    """Returns a 63-bit seed made from the parts by a cryptographic hash. It is the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
