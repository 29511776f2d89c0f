"""Trains a few steps and prints, as JSON, the most bytes of tensors that were alive at once on rank 0.

python -m tests.trainer.planning.measured_memory CONFIG key.path=value ...; also under torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from trainer.config.run_config import load
from trainer.engine import distributed
from trainer.planning.live import LiveTensors
from trainer.training import build, loop


def measure(config: Path, overrides: list[str]) -> int:
    """From before the network is made; without the checkpoint, whose copies are on the CPU whatever trains."""
    loaded = load(config, overrides)
    Path(loaded.run_dir).mkdir(parents=True, exist_ok=True)
    ranks = distributed.init()
    save, loop.save = loop.save, lambda run: None
    try:
        with LiveTensors() as live:
            run = build.run(loaded, ranks)
            live.peak = live.live  # making it is not training it
            loop.train(run, lambda: False)
    finally:
        loop.save = save
    return live.peak


def main(argv: list[str]) -> int:
    peak = measure(Path(argv[0]), argv[1:])
    if distributed.init().is_main:
        print(json.dumps({"peak": peak}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
