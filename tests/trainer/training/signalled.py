"""`python -m tests.trainer.training.signalled FOLDER CONFIG key.path=value ...`: a training for each signal, which
sends it to its process group in the middle of its fifth step. FOLDER gets the runs and the exit codes, by the signals'
names."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from ambient_core import errors
from tests.faults.starts import Start, preload
from trainer import train
from trainer.training import step as step_module

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


def training(number: signal.Signals, folder: Path, words: list[str]) -> int:
    honest = step_module.step_loss

    def signalled(run: Any, batch: Any, step: int, *rest: Any) -> Any:
        if step == 4:
            os.killpg(0, number)
        return honest(run, batch, step, *rest)

    step_module.step_loss = signalled
    return errors.run(lambda: train.main([*words, f"run_dir={folder / number.name}"]))


def main(folder: Path, words: list[str]) -> None:
    preload()
    for number in SIGNALS:
        start = Start(lambda _, number=number: training(number, folder, words), 1, folder, number.name)
        (folder / f"{number.name}.code").write_text(str(start.end()[0]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
