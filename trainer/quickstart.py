"""`make quickstart`: corrupts real images, trains two models on the noisy images alone, and draws one picture of
both."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ambient_core import errors
from ambient_core.arguments import Parser
from ambient_core.errors import UserError, WorkFailed
from trainer.tracking import pages

SIGMA = 0.5
SIZES = {"digits": 28, "fashion": 28, "emoji": 32, "faces": 32}
LEVELS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
"""Noise levels at which the denoisers are compared; 0.25 is half of sigma_n."""
EXAMPLE = """examples:
  python -m trainer.quickstart
  python -m trainer.quickstart --dataset fashion --out fashion.png
"""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m trainer.quickstart",
        description="Corrupts a packaged set of images, trains on the noisy images alone with the ambient and "
        "consistency losses, trains a naive model that treats them as clean with the same number of network "
        "evaluations, and draws one picture of both.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--dataset", choices=sorted(SIZES), default="digits", help="a packaged set of images (default: digits)"
    )
    p.add_argument(
        "--config",
        type=Path,
        default=Path("configs/quickstart.yaml"),
        help="configuration of both runs (default: configs/quickstart.yaml)",
    )
    p.add_argument("--steps", type=int, help="optimizer steps (default: the configuration's)")
    p.add_argument("--out", type=Path, default=Path("quickstart.png"), help="the picture (default: quickstart.png)")
    p.add_argument("--folder", type=Path, default=Path("runs"), help="folder for runs and shards (default: runs)")
    p.add_argument("--started", type=float, help=argparse.SUPPRESS)  # `make` includes the time of the installation
    return p


@dataclass(frozen=True)
class Places:
    """The folders of a quickstart."""

    shards: Path
    ours: Path
    naive: Path

    @property
    def database(self) -> Path:
        return self.ours.parent / "mlflow.db"


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps {args.steps}: must be at least 1", field="--steps", code="invalid")
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: must end in .png", field="--out", code="invalid")
    if not args.config.is_file():
        raise UserError(
            f"--config {args.config}: no such file; start it from the project's folder",
            field="--config",
            code="not_found",
        )
    started = args.started or time.time()
    runs = args.folder / f"quickstart-{args.dataset}"
    places = Places(runs / "shards", runs / "ambient", runs / "naive")

    _say("1/4  shards of noisy images; no clean image is written")
    _python(
        "data_pipeline.shard",
        f"packaged:{args.dataset}/train",
        str(places.shards),
        "--sigma",
        str(SIGMA),
        "--size",
        str(SIZES[args.dataset]),
    )
    _say("2/4  training on them: ambient loss, and consistency")
    common = [str(args.config), f"data.shards={places.shards}", f"logging.experiment=quickstart-{args.dataset}"]
    _python("trainer.train", *common, f"run_dir={places.ours}", *([f"steps={args.steps}"] if args.steps else []))
    from trainer.inference.load import restore

    ours = restore(places.ours)
    _say("3/4  naive training, which treats them as clean, with the same number of network evaluations")
    steps = ours.state.evaluations // ours.config.batch_size
    _python(
        "trainer.train",
        *common,
        f"run_dir={places.naive}",
        f"steps={steps}",
        "consistency=null",
        "data.sigma_scale=0",
        "ambient.pairs=false",
    )
    _say("4/4  samples, and the denoisers' error against held-out clean images")
    from trainer.reports.quickstart_figure import compare

    error_ours, error_naive = compare(ours, restore(places.naive), f"packaged:{args.dataset}/test", LEVELS, args.out)
    half = LEVELS.index(SIGMA / 2)
    print(_summary(args.out, places))
    print(
        json.dumps(
            {
                "picture": str(args.out),
                "minutes": round((time.time() - started) / 60, 2),
                "mse_at_half_sigma": {"ours": round(error_ours[half], 5), "naive": round(error_naive[half], 5)},
            }
        )
    )
    return errors.DONE


def _python(module: str, *arguments: str) -> None:
    """Runs a command as a user would type it, and shows it."""
    command = ["-m", module, *arguments]
    print(f"$ python {shlex.join(command)}", flush=True)
    process = subprocess.Popen([sys.executable, *command])
    # Ctrl-C reaches the command, too, which then saves a checkpoint: wait for it.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGINT, handler)
    if code == errors.INTERRUPTED:
        raise WorkFailed("interrupted; run it again to resume")
    if code:
        raise WorkFailed(f"`python {shlex.join(command)}` ended with exit code {code}")


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _summary(picture: Path, places: Places) -> str:
    lines = {
        "shards": places.shards,
        "runs": f"{places.ours}  {places.naive}",
        "picture": picture,
        "more images": f"python -m trainer.sample {places.ours} --number 64",
        "charts": pages.server(places.database),
    }
    runs = [places.ours, places.naive]
    if all(pages.logged(run_dir) for run_dir in runs):  # false if logging.enabled=false
        lines["then open"] = pages.compare_page(runs)
    return "\n" + "\n".join(f"{name:<12}{value}" for name, value in lines.items()) + "\n"


if __name__ == "__main__":
    sys.exit(errors.run(main))
