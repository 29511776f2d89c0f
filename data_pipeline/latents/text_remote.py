"""A text cache at a URL: made in a folder of this machine and put there; fetched completely into one before it is
read."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from ambient_core import paths, storage
from ambient_core.errors import UserError, WorkFailed
from data_pipeline.latents.text_cache import ARRAYS, CAPTIONS, DONE, TextCache

FILES = (CAPTIONS, *ARRAYS, DONE)
"""text.json last: a folder that has it is complete."""


def workplace(url: str) -> Path:
    """Where the cache of this URL is made; the same in a later call, which continues it."""
    return paths.cache() / "text" / "made" / hashlib.sha256(url.encode()).hexdigest()[:16]


def put(folder: Path, url: str) -> None:
    """Raises OSError where the storage fails; then a later call puts all of it again."""
    for name in FILES:
        storage.put(folder / name, storage.join(url, name))


def open_text(place: str) -> TextCache:
    """The text cache of a folder or URL; see `TextCache`. A remote one is fetched once for all processes of a
    machine, into AMBIENT_CACHE. Raises UserError where it is not complete, WorkFailed where it cannot be fetched."""
    local = storage.local_path(place)
    if local is not None:
        return TextCache(local)
    try:
        described = storage.read_bytes(storage.join(place, DONE))
        folder = paths.cache() / "text" / hashlib.sha256(f"{place}\n".encode() + described).hexdigest()[:16]
        if not folder.is_dir():
            partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name in FILES:
                storage.get(storage.join(place, name), partial / name)
            try:
                partial.rename(folder)
            except OSError:  # another process was faster
                shutil.rmtree(partial)
    except FileNotFoundError as error:
        name = os.path.basename(error.filename)
        raise UserError(
            f"{place}: no {name} in it, so the embeddings are not complete: encode the captions again",
            field=place,
            code="not_found",
        ) from None
    except OSError as error:
        raise WorkFailed(f"{place}: cannot be fetched: {error.strerror or error}") from None
    return TextCache(folder)
