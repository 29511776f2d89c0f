"""bash completes commands, options and fields."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from trainer import cli
from trainer.completion import script


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "ambient.bash"
    path.write_text(script({name: module for name, (module, _) in cli.COMMANDS.items()}))
    return path


def completed(file: Path, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    quoted = " ".join(f"'{word}'" for word in ("ambient", *words))
    program = f"source '{file}'; COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _ambient 2>/dev/null; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=file.parent, check=True)
    return result.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("tr",), ["train"]),
        (("s",), ["shard", "sample", "study", "submit", "status"]),
        (("train", "c.yaml", "optimizer.l"), ["optimizer.lr="]),
        (("train", "c.yaml", "recovery."), ["recovery.leave_out=", "recovery.roll_back=", "recovery.spike="]),
        (("plan", "c.yaml", "--gp"), ["--gpu", "--gpus"]),
        (("shard", "a", "b", "--sig"), ["--sigma"]),
        (("sample", "a", "optimizer.l"), []),
        (("train", "c.yaml", "engine.precision", "=", "b"), []),
    ],
)
def test_it_offers_what_fits(file: Path, words: tuple[str, ...], offered: list[str]) -> None:
    assert sorted(completed(file, *words)) == sorted(offered)
