"""A text cache at a URL. It is made in a local folder and then uploaded; it is downloaded completely before it is
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
"""The files of a text cache, in the order of their upload. text.json is last: a folder that has it is complete."""


def workplace(url: str) -> Path:
    """Returns the local folder in which the cache of this URL is made. It is the same in a later call, which resumes
    the work."""
    return paths.cache() / "text" / "made" / hashlib.sha256(url.encode()).hexdigest()[:16]


def put(folder: Path, url: str) -> None:
    """Uploads a complete text cache. Raises OSError if the storage fails; a later call then uploads all files again."""
    for name in FILES:
        storage.put(folder / name, storage.join(url, name))


def open_text(place: str) -> TextCache:
    """Returns the `TextCache` of a folder or URL. A remote one is downloaded into AMBIENT_CACHE, once for all processes
    of a machine. Raises UserError if it is not complete, WorkFailed if it cannot be downloaded."""
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
