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
    program = (
        f"source '{file}'; COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _ambient 2>/dev/null; printf '%s\\n' "
        '"${COMPREPLY[@]}"'
    )
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=file.parent, check=True)
    return result.stdout.strip("\n").split("\n")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("tr",), ["train"]),
        (("s",), ["shard", "sample", "study", "submit", "status"]),
        (("train", "c.yaml", "optimizer.l"), ["optimizer.lr="]),
        (("train", "c.yaml", "recovery."), ["recovery.leave_out=", "recovery.roll_back=", "recovery.spike="]),
        (("train", "c.yaml", "process.k"), ["process.kind="]),
        (("plan", "c.yaml", "--gp"), ["--gpu", "--gpus"]),
        (("shard", "a", "b", "--sig"), ["--sigma"]),
        (("sample", "a", "optimizer.l"), [""]),
    ],
)
def test_it_offers_names_that_fit(file: Path, words: tuple[str, ...], offered: list[str]) -> None:
    assert sorted(completed(file, *words)) == sorted(offered)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("train", "c.yaml", "engine.precision", "=", "b"), ["bf16"]),
        (("train", "c.yaml", "engine.precision=b"), ["engine.precision=bf16"]),  # where "=" parts no words, as in zsh
        (("train", "c.yaml", "process.kind", "="), ["ve", "vp_table", "vp_cosine", "flow"]),
        (("submit", "c.yaml", "ambient.pairs", "="), ["true", "false"]),
        (("plan", "c.yaml", "consistency", "="), ["null"]),
        (("train", "c.yaml", "optimizer.lr", "=", "1"), [""]),
        (("sample", "a", "--sampler", "d"), ["ddim", "dpmpp_2m"]),
        (("sample", "a", "--sampler", "=", "h"), ["heun"]),
        (("shard", "a", "b", "--corruption", "b"), ["box-mask", "blur"]),
        (("sample", "a", "--sampler", "ddim", "--chec"), ["--checkpoint"]),
    ],
)
def test_it_offers_values_that_have_a_name(file: Path, words: tuple[str, ...], offered: list[str]) -> None:
    assert sorted(completed(file, *words)) == sorted(offered)


def test_names_of_files_stay_whole_beside_fields(file: Path) -> None:
    (file.parent / "my run.yaml").touch()
    (file.parent / "my runs").mkdir()
    assert sorted(completed(file, "train", "my")) == [r"my\ run.yaml", r"my\ runs/"]
    assert completed(file, "sample", "my") == [""]  # bash's own completion of files takes over
