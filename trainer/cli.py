"""The console script `ambient`: each subcommand is also `python -m ...`."""

from __future__ import annotations

import sys
from importlib import import_module

import trainer
from ambient_core import errors
from ambient_core.arguments import did_you_mean, giving
from ambient_core.errors import UserError

COMMANDS = {
    "shard": ("data_pipeline.shard", "corrupt images once, and write them as shards"),
    "inspect": ("data_pipeline.inspect", "verify shards, and show what is in them"),
    "init": ("trainer.init", "write a commented configuration for your shards and GPUs"),
    "train": ("trainer.train", "train a run, or resume it"),
    "sample": ("trainer.sample", "draw images from a run"),
    "evaluate": ("trainer.evaluate", "judge runs by clean images: quality, error per level, memorization"),
    "study": ("trainer.study", "a grid of runs, trained and judged alike, and one table"),
    "export": ("trainer.export", "write a run's model as diffusers loads it"),
    "plan": ("trainer.plan", "what a run takes in memory, time and traffic, before it starts"),
    "doctor": ("trainer.doctor", "what of this machine works for training, and what to do about the rest"),
    "submit": ("slurm.submit", "train by jobs of a cluster, one run or a sweep"),
    "status": ("slurm.status", "how far submitted runs are"),
    "quickstart": ("trainer.quickstart", "all of it on a packaged set of images, in minutes"),
}


ON_A_CLUSTER = {"shard": "slurm.shard", "evaluate": "slurm.evaluate"}
"""Commands that have another module where --cluster is given."""


def usage() -> str:
    lines = "\n".join(f"  {name:<12}{about}" for name, (_, about) in COMMANDS.items())
    return (
        f"usage: ambient COMMAND ...\n\nTrains diffusion models from corrupted images alone.\n\n{lines}\n\n"
        "example:\n  ambient shard packaged:digits data/digits --sigma 0.5\n\n"
        "`ambient COMMAND --help` says more; `ambient --version` prints the version; `source <(ambient "
        "completion)` lets bash complete, and `ambient completion` begins with how zsh does."
    )


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return errors.DONE if argv else errors.BAD_REQUEST
    if argv[0] == "--version":
        print(trainer.__version__)
        return errors.DONE
    if argv[0] == "completion":
        from trainer.completion import script as completion

        print(completion({name: module for name, (module, _) in COMMANDS.items()}), end="")
        return errors.DONE
    if argv[0] not in COMMANDS:
        hint = did_you_mean(argv[0], [*COMMANDS, "completion"]) or f"; there are {', '.join(COMMANDS)}"
        raise UserError(f"{argv[0]}: no such command{hint}", field="COMMAND", code="unknown")
    module = COMMANDS[argv[0]][0]
    if giving(argv[1:], "--cluster"):
        module = ON_A_CLUSTER.get(argv[0], module)
    return import_module(module).main(argv[1:])


def script() -> None:
    """The console script's entry."""
    sys.exit(errors.run(lambda: main(sys.argv[1:])))
