"""The commands around training: sample, quickstart, and the console script."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import TINY, Outcome
from trainer import cli, errors, sample
from trainer.evaluation.denoiser_error import denoiser_error
from trainer.generate import generate
from trainer.restore import restore

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
    arguments = [str(tmp_path / "run"), "--num", "9", "--steps", "3", "--stop-at", "0.4"]
    assert errors.run(lambda: sample.main(arguments)) == 0
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert picture.size == (2 * (3 * 17 + 1),) * 2


def test_a_guide_changes_the_samples_unless_the_scale_is_one(train: Train, tmp_path: Path) -> None:
    assert train("run")[0] == 0
    assert train("short", "steps=3")[0] == 0
    pictures: list[bytes] = []
    for extra in ([], ["--guide", str(tmp_path / "short")], ["--guide", str(tmp_path / "short"), "--guidance", "1"]):
        arguments = [str(tmp_path / "run"), "--num", "4", "--steps", "3", *extra, "--out", str(tmp_path / "out.png")]
        assert errors.run(lambda arguments=arguments: sample.main(arguments)) == 0
        with Image.open(tmp_path / "out.png") as picture:
            pictures.append(picture.tobytes())
    assert pictures[0] != pictures[1]
    # h + 1 (g - h) rounds otherwise than g, by at most one grey value
    assert max(abs(a - b) for a, b in zip(pictures[0], pictures[2], strict=True)) <= 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{run}", "--num", "0"], "--num 0: must be at least 1"),
        (["{run}", "--stop-at", "30"], "--stop-at 30: must be from 0.05 to below 20"),
        (["{run}", "--out", "grid.txt"], "must be a file that ends in .png"),
        (["{tmp}/nowhere"], "not a run directory"),
        (["{run}", "--guidance", "2"], "--guidance 2: needs --guide, or a run with text"),
        (["{run}", "--guidance", "0"], "--guidance 0: must be above 0 and below 100"),
        (["{run}", "--guide", "{tmp}/nowhere"], "nowhere: not a run directory"),
    ],
)
def test_a_wrong_request_to_sample_is_one_line(
    arguments: list[str], expected: str, train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("run", "steps=1")[0] == 0
    filled = [a.format(run=tmp_path / "run", tmp=tmp_path) for a in arguments]
    assert errors.run(lambda: sample.main(filled)) == 2
    assert expected in capfd.readouterr().err.splitlines()[-1]


def test_the_denoisers_error_is_the_mean_square_per_level() -> None:
    x0 = torch.randn(300, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    errors_of_identity = denoiser_error(lambda x, sigma, c: x, x0, [0.1, 1.0])
    assert errors_of_identity == pytest.approx([0.01, 1.0], rel=0.1)
    assert denoiser_error(lambda x, sigma, c: x / 2, x0, [1.0])[0] == pytest.approx(0.5, rel=0.1)  # x/2 is optimal here


def test_quickstart_from_images_to_picture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from trainer import quickstart

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
    for call in range(2):
        assert errors.run(lambda: quickstart.main(arguments)) == 0
        printed = capfd.readouterr()
        assert printed.err.count("already done at step") == 2 * call, "a second call reuses what exists"
        result = json.loads(printed.out.splitlines()[-1])
        assert result["picture"] == str(tmp_path / "out.png")
        assert result["mse_at_half_sigma"].keys() == {"ours", "naive"}
        assert result["minutes"] < 5
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
