"""The commands around training: sample, quickstart, and the console script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ambient_core import errors
from ambient_core.errors import Code
from tests.conftest import TINY, Outcome
from tests.pages import called
from tests.refusals import refusal, run
from tests.trainer.in_turn import on_two_ranks
from trainer import cli, sample
from trainer.evaluation.denoiser_error import denoiser_error
from trainer.inference.generate import generate
from trainer.inference.grids import to_pixels
from trainer.inference.load import restore
from trainer.models.adapter import Adapter

Train = Callable[..., Outcome]


def test_samples_do_not_depend_on_the_batch_they_are_in(train: Train, tmp_path: Path) -> None:
    assert train("run")[0] == 0
    run = restore(tmp_path / "run")
    kwargs = {"seed": 3, "steps": 5, "sampler": "ancestral", "progress": False}
    whole = generate(run.denoiser, 6, run.state.shape, **kwargs)  # pyright: ignore[reportArgumentType]
    parts = generate(run.denoiser, 6, run.state.shape, batch_size=4, **kwargs)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4)
    assert whole.isfinite().all()


def test_sample_writes_a_grid(train: Train, tmp_path: Path) -> None:
    assert train("run")[0] == 0
    arguments = [str(tmp_path / "run"), "--number", "9", "--steps", "3", "--stop-at", "0.4"]
    assert errors.run(lambda: sample.main(arguments)) == 0
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert picture.size == (2 * (3 * 17 + 1),) * 2


def files_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


def test_a_folder_gets_a_png_an_image_and_keeps_those_that_it_has(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("run")[0] == 0
    run, folder = restore(tmp_path / "run"), tmp_path / "images"
    expected = to_pixels(generate(run.denoiser, 8, run.state.shape, seed=3, steps=3, progress=False)).astype(int)
    monkeypatch.setattr(Adapter, "at_once", 3)

    def draw(number: int, *more: str) -> int:
        words = [str(tmp_path / "run"), "--number", str(number), "--seed", "3", "--steps", "3", "--out", str(folder)]
        return errors.run(lambda: sample.main([*words, *more]))

    assert draw(7) == 0
    first = files_in(folder)
    assert list(first) == [*(f"{i:06d}.png" for i in range(7)), "sampling.json"]
    (folder / "000004.png").unlink()
    assert draw(8) == 0
    assert "; 6 of them existed already" in capfd.readouterr().out
    then = files_in(folder)
    assert {name for name in then if then[name] != first.get(name)} == {"000004.png", "000007.png"}
    assert then["000004.png"][0] == first["000004.png"][0]
    for i in range(8):
        with Image.open(folder / f"{i:06d}.png") as picture:
            assert abs(np.asarray(picture).astype(int) - expected[i]).max() <= 1
    assert draw(8, "--steps", "4", "--sampler", "ddim") == 2
    assert "holds images with sampler=heun, not ddim; steps=3, not 4: choose another" in capfd.readouterr().err
    (folder / "sampling.json").write_text("{")
    assert draw(8) == 2
    assert "sampling.json: cannot be read" in capfd.readouterr().err


def test_two_processes_draw_the_files_that_one_draws(train: Train, tmp_path: Path) -> None:
    assert train("run")[0] == 0
    words = [str(tmp_path / "run"), "--number", "150", "--steps", "2", "--out"]
    assert errors.run(lambda: sample.main([*words, str(tmp_path / "one")])) == 0
    code, output = on_two_ranks([[*words, str(tmp_path / "two")]], "trainer.sample")
    assert code == 0, output
    assert "; 0 of them existed already" in output
    one, two = files_in(tmp_path / "one"), files_in(tmp_path / "two")
    assert {name: data for name, (data, _) in one.items()} == {name: data for name, (data, _) in two.items()}
    code, output = on_two_ranks([[*words, str(tmp_path / "a.png")]], "trainer.sample")
    assert code == 2
    assert "one process draws a grid, and there are 2: give a folder" in output


def test_a_guide_changes_the_samples_unless_the_scale_is_one(train: Train, tmp_path: Path) -> None:
    assert train("run")[0] == 0
    assert train("short", "steps=3")[0] == 0
    pictures: list[bytes] = []
    for extra in ([], ["--guide", str(tmp_path / "short")], ["--guide", str(tmp_path / "short"), "--guidance", "1"]):
        arguments = [str(tmp_path / "run"), "--number", "4", "--steps", "3", *extra, "--out", str(tmp_path / "out.png")]
        assert errors.run(lambda arguments=arguments: sample.main(arguments)) == 0
        with Image.open(tmp_path / "out.png") as picture:
            pictures.append(picture.tobytes())
    assert pictures[0] != pictures[1]
    # h + 1 (g - h) rounds otherwise than g, by at most one grey value
    assert max(abs(a - b) for a, b in zip(pictures[0], pictures[2], strict=True)) <= 1


@pytest.mark.parametrize(
    ("arguments", "field", "mistake"),
    [
        (["{run}", "--number", "0"], "--number", "invalid"),
        (["{run}", "--stop-at", "30"], "--stop-at", "invalid"),
        (["{run}", "--out", "grid.jpg"], "--out", "invalid"),
        (["{run}", "--out", "{run}"], "--out", "in_use"),
        (["{run}", "--out", "{run}/config.yaml"], "--out", "invalid"),
        (["{run}", "--out", "{run}/config.yaml/a"], "--out", "unwritable"),
        (["{tmp}/nowhere"], "nowhere", "not_found"),
        (["{run}", "--guidance", "2"], "--guidance", "conflict"),
        (["{run}", "--guidance", "0"], "--guidance", "invalid"),
        (["{run}", "--guide", "{tmp}/nowhere"], "nowhere", "not_found"),
    ],
)
def test_a_wrong_request_to_sample_is_one_line(
    arguments: list[str], field: str, mistake: Code, train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("run", "steps=1")[0] == 0
    filled = [a.format(run=tmp_path / "run", tmp=tmp_path) for a in arguments]
    assert run(lambda: sample.main(filled)) == 2
    assert refusal() == (field, mistake)


def test_the_denoisers_error_is_the_mean_square_per_level() -> None:
    x0 = torch.randn(300, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    errors_of_identity = denoiser_error(lambda x, sigma, c: x, x0, [0.1, 1.0])
    assert errors_of_identity == pytest.approx([0.01, 1.0], rel=0.1)
    assert denoiser_error(lambda x, sigma, c: x / 2, x0, [1.0])[0] == pytest.approx(0.5, rel=0.1)  # x/2 is optimal here


def test_quickstart_from_images_to_picture(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    empty_store: Callable[[Path], None],
) -> None:
    """Sharding is in a process of its own, as for a user; the trainings are in this one, since a process of theirs
    takes seconds to start."""
    from trainer import quickstart
    from trainer.reports import quickstart_figure

    monkeypatch.setattr(quickstart_figure, "STEPS", 2)
    monkeypatch.setattr(quickstart_figure, "HELD_OUT", 16)
    honest = quickstart._python

    def in_process_after_sharding(*words: str) -> None:
        if words[0] == "data_pipeline.shard":
            honest(*words)
        else:
            called(["python", "-m", *words])

    config = tmp_path / "config.yaml"
    config.write_text(TINY.read_text().replace("enabled: false", "enabled: true"))
    arguments = [
        "--config",
        str(config),
        "--folder",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "out.png"),
        "--steps",
        "4",
    ]
    empty_store(tmp_path / "runs" / "quickstart-digits" / "mlflow.db")
    monkeypatch.setattr(quickstart, "_python", in_process_after_sharding)
    for call in range(2):
        assert errors.run(lambda: quickstart.main(arguments)) == 0
        printed = capfd.readouterr()
        assert printed.err.count("already done at step") == 2 * call, "a second call reuses what exists"
        result = json.loads(printed.out.splitlines()[-1])
        assert result["picture"] == str(tmp_path / "out.png")
        assert result["mse_at_half_sigma"].keys() == {"ours", "naive"}
        assert result["minutes"] >= 0
        assert "mlflow server --backend-store-uri" in printed.out
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.width > 1000
    states = [restore(tmp_path / "runs" / "quickstart-digits" / name).state for name in ("ambient", "naive")]
    assert states[0].evaluations == states[1].evaluations == 4 * 8 + 1 * 3 * 8, "the same budget"


def test_console_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert errors.run(lambda: cli.main(["--help"])) == 0
    usage = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert name in usage
        with pytest.raises(SystemExit) as ended:
            cli.main([name, "--help"])
        assert ended.value.code == 0
        assert "example" in capsys.readouterr().out
    assert errors.run(lambda: cli.main(["trian"])) == 2
    assert "did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "suggested"),
    [
        ("shard a b --sigm 0.2", "--sigma"),
        ("sample a --samplr=ddim", "--sampler"),
        ("sample a --sampler ddmi", "ddim"),
        ("plan c.yaml --gpus 1 --gpu H100", "h100"),
    ],
)
def test_of_a_misspelt_option_or_value_it_says_what_may_be_meant(
    words: str, suggested: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert f"; did you mean {suggested}?; see python -m" in said
    assert said.count("\n") == 1
