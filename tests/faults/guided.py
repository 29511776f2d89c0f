"""Coverage-guided fuzzing (atheris): what reaches new code is varied further. Which needs `pip install atheris`.

    python -m tests.faults.guided index --seconds 300
    for kind in $(python -m tests.faults.guided --kinds); do python -m tests.faults.guided $kind --seconds 60; done

KIND is one of hostile.py's. It sets out from the files in tests/faults/hostile/KIND and from good ones, and ends with
code 0 after that time, or with a traceback at the first file that gets another error than a documented one, takes 30 s
or 2 GiB. That file's name is said: put it into tests/faults/hostile/KIND, where it is a test, and mend the code.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

SLOW_S, MEMORY_MB = 30, 2048


def main() -> int:
    p = argparse.ArgumentParser(
        prog="python -m tests.faults.guided", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("kind", nargs="?", help="what to spoil")
    p.add_argument("--kinds", action="store_true", help="say what there is")
    p.add_argument("--seconds", type=int, default=60, help="how long (default: 60)")
    args = p.parse_args()
    try:
        atheris = importlib.import_module("atheris")
    except ImportError:
        p.error("needs atheris, which the project does without otherwise: pip install atheris")

    with atheris.instrument_imports(include=["data_pipeline", "trainer", "slurm"]):
        from tests.faults.hostile import FOLDER, Victim, told
    folder = Path(tempfile.mkdtemp(prefix="guided-"))
    kinds = Victim(folder / "victim").kinds
    if args.kinds or args.kind not in kinds:
        print("\n".join(kinds))
        return 0 if args.kinds else 2
    corpus = folder / "corpus"
    shutil.copytree(FOLDER / args.kind, corpus)
    for number, path in enumerate(good(args.kind, folder / "victim")):
        shutil.copy(path, corpus / f"good-{number}{path.suffix}")
    suffix = {
        "source": (".npy", ".zip", ".tar", ".npz"),
        "captions": (".csv", ".jsonl", ".txt"),
        "tensors": (".safetensors",),
    }

    def one(data: bytes) -> None:
        """The first byte chooses what the file's name ends with, where that matters."""
        endings = suffix.get(args.kind, ("",))
        path = folder / f"one{endings[data[0] % len(endings)] if data else endings[0]}"
        path.unlink(missing_ok=True)  # it may be linked to
        path.write_bytes(data[1:] if len(endings) > 1 else data)
        told(kinds[args.kind], path)

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libFuzzer speaks on stderr
    options = [
        f"-max_total_time={args.seconds}",
        f"-timeout={SLOW_S}",
        f"-rss_limit_mb={MEMORY_MB}",
        "-max_len=65536",
        f"-artifact_prefix={folder}/",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()
    return 0


def good(kind: str, victim: Path) -> list[Path]:
    """Files as they should be."""
    root = Path(__file__).parent.parent.parent
    return {
        "index": [victim / "shards" / "index.json"],
        "shard": sorted((victim / "shards").glob("*.tar"))[:1],
        "inspected": sorted((victim / "shards").glob("*.tar"))[:1],
        "picture": [victim / "pictures" / "00.png"],
        "configuration": sorted((root / "configs").glob("*.yaml")),
        "cluster": sorted((root / "configs" / "clusters").glob("*.yaml")),
        "study": sorted((root / "configs" / "studies").glob("*.yaml")),
    }.get(kind, [])


if __name__ == "__main__":
    sys.exit(main())
