"""Writes the text cache of a folder of shards, and describes it for the index."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import Any

from ambient_core import storage
from data_pipeline.latents.parts import ENCODERS, TOKENIZERS, has_part

FOLDER = "text"
"""The text cache's folder in OUTPUT."""


def write_captions(output: str, source: str, captions: Sequence[str]) -> dict[str, Any] | None:
    """Writes OUTPUT/text/, or resumes writing it, and returns what the index records about it.

    source: the source of the VAE, whose pipeline may have text encoders. Returns None if there are no captions, or no
    text encoders; the latter is reported on stderr.
    """
    if not captions:
        return None
    if not has_part("--latents", source, ENCODERS[0], [*ENCODERS[1:], *TOKENIZERS]):
        print(
            (
                f"{output}: the captions are not embedded, because {source} has no text encoders; the shards hold "
                "them as text"
            ),
            file=sys.stderr,
        )
        return None
    from data_pipeline.latents.text import TextEncoders  # here, since torch takes seconds
    from data_pipeline.latents.text_cache import TextCache, write_text_cache
    from data_pipeline.latents.text_remote import put, workplace

    place = storage.join(output, FOLDER)
    local = storage.local_path(place)
    folder = local or workplace(place)
    write_text_cache(folder, captions, TextEncoders(source))
    cache = TextCache(folder)
    described = {"identity": cache.identity, "captions": len(cache), "cut": cache.cut}
    if local is None:
        put(folder, place)
        shutil.rmtree(folder)
    return described
