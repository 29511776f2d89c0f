"""The console script `ambient`: each subcommand can also be called as `python -m MODULE`."""

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
    "evaluate": (
        "trainer.evaluate",
        "evaluate runs with held-out images: quality, error per noise level, memorization",
    ),
    "study": ("trainer.study", "train and evaluate a grid of runs in the same way, and write one table"),
    "export": ("trainer.export", "write a run's model in the format that diffusers loads"),
    "plan": ("trainer.plan", "estimate the memory, time and network traffic of a run before it starts"),
    "doctor": ("trainer.doctor", "check whether training works on this machine, and say what to do about problems"),
    "submit": ("slurm.submit", "train one run or a sweep as jobs on a cluster"),
    "status": ("slurm.status", "show the progress of submitted runs"),
    "quickstart": ("trainer.quickstart", "run all of this on a packaged set of images, in minutes"),
}


ON_A_CLUSTER = {"shard": "slurm.shard", "evaluate": "slurm.evaluate"}
"""The modules that replace those of COMMANDS if --cluster is given."""


def usage() -> str:
    lines = "\n".join(f"  {name:<12}{about}" for name, (_, about) in COMMANDS.items())
    return (
        f"usage: ambient COMMAND ...\n\nTrains diffusion models from corrupted images alone.\n\n{lines}\n\n"
        "example:\n  ambient shard packaged:digits data/digits --sigma 0.5\n\n"
        "`ambient COMMAND --help` describes a command; `ambient --version` prints the version. `source <(ambient "
        "completion)` enables completion in bash; the first lines of `ambient completion` say how to enable it in zsh."
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
    """The entry point of the console script."""
    sys.exit(errors.run(lambda: main(sys.argv[1:])))
