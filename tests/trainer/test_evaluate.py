"""`trainer.evaluate` as a user calls it: on runs, from data to the report and MLflow, again without work, and on
mistakes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from ambient_core import errors
from data_pipeline.corruption.corruption import Measured
from data_pipeline.inputs.sources import open_source
from data_pipeline.shard import shard
from slurm.evaluate import main as by_jobs
from tests.conftest import Outcome
from trainer.evaluate import main
from trainer.evaluation.denoiser_error import errors_by_image
from trainer.evaluation.distances import kid
from trainer.evaluation.features import PACKAGED, open_extractor
from trainer.evaluation.images import Images
from trainer.inference.generate import generate
from trainer.inference.load import restore
from trainer.reports.html import incomparable, report
from trainer.reports.record import read
from trainer.tracking.client import connect
from trainer.tracking.config import LoggingConfig

Train = Callable[..., Outcome]
SMALL = ["--number", "12", "--attacked", "10", "--steps", "4", "--levels", "0.2", "0.4", "1", "30"]


@pytest.fixture
def held_out(tmp_path: Path, pictures: Path) -> Path:
    """Other pictures, of the same kind."""
    folder = tmp_path / "held-out"
    folder.mkdir()
    for path in sorted(pictures.iterdir())[:20]:
        Image.open(path).transpose(Image.Transpose.TRANSPOSE).save(folder / path.name)
    return folder


def evaluate(capfd: pytest.CaptureFixture[str], *words: str, command: Callable[[list[str]], int] = main) -> Outcome:
    capfd.readouterr()
    code = errors.run(lambda: command([str(word) for word in words]))
    return code, "".join(capfd.readouterr())


def test_a_run_is_evaluated_once_and_its_figures_are_in_mlflow(
    train: Train, tmp_path: Path, pictures: Path, held_out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("run", "logging.enabled=true", "steps=2")[0] == 0
    run_dir = tmp_path / "run"
    words = [str(run_dir), "--reference", str(held_out), "--training", str(pictures), *SMALL]
    code, output = evaluate(capfd, *words)
    assert code == 0, output
    assert "KID" in output
    assert "AUC, noise" in output
    (folder,) = (run_dir / "evaluation").glob("step-00000002-*")
    kept = json.loads((folder / "evaluation.json").read_text())
    assert kept["curve"]["levels"] == [0.2, 0.4, 1.0], "30 is above the process's sigma_max"
    assert kept["sigma_n"] == [0.4, 0.4]
    run = restore(run_dir)
    images = Images("held out", open_source(str(held_out)), run.state.shape, 20)
    truth = errors_by_image(run.denoiser, images.rows(range(20)), [0.2, 0.4, 1.0])
    assert kept["curve"]["mean"] == pytest.approx(truth.mean(1).tolist(), rel=1e-5)
    assert kept["curve"]["error"] == pytest.approx((truth.std(1) / 20**0.5).tolist(), rel=1e-5)
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list(folder.glob("*.png"))) + 1, "and the curves of all runs"
    assert 'src="http' not in page

    from mlflow.tracking import MlflowClient

    run_id = json.loads((run_dir / "mlflow.json").read_text())["run_id"]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    found = client.get_run(run_id)
    assert {name: found.data.metrics[name] for name in kept["metrics"]} == pytest.approx(kept["metrics"])
    assert "EfficientNet" in found.data.tags["evaluation.extractor"]
    assert f"evaluation/{folder.name}/report.html" in [
        item.path for item in client.list_artifacts(run_id, f"evaluation/{folder.name}")
    ]

    before = {path: path.stat().st_mtime_ns for path in (run_dir / "evaluation").rglob("*.png")}
    assert evaluate(capfd, *words)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "evaluation").rglob("*.png")} == before
    assert len(client.get_metric_history(run_id, "quality/kid")) == 1


def test_several_runs_are_compared_in_one_page(
    train: Train, tmp_path: Path, held_out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        assert train(name, "steps=1", f"seed={len(name)}")[0] == 0
    out = tmp_path / "both.html"
    words = ["--reference", str(held_out), "--number", "0", "--levels", "0.4", "2", "--out", str(out)]
    code, output = evaluate(capfd, str(tmp_path / "a"), str(tmp_path / "b"), *words)
    assert code == 0, output
    assert "has no MLflow run" in output
    page = out.read_text()
    assert "<h2>a</h2>" in page
    assert "<h2>b</h2>" in page
    assert "KID" not in page, "no samples were drawn"


@pytest.mark.long
def test_a_latent_run_is_judged_by_its_images(
    train_sdxl: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train_sdxl("run", "steps=1")[0] == 0
    held_out = tmp_path / "photos"
    held_out.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(held_out / f"{i}.png")
    training = tmp_path / "others"
    training.mkdir()
    for path in held_out.iterdir():
        Image.open(path).rotate(180).save(training / path.name)
    words = ["--number", "10", "--attacked", "10", "--steps", "2", "--levels", "0.4", "--attack-sigma", "2"]
    code, output = evaluate(
        capfd, str(tmp_path / "run"), "--reference", str(held_out), "--training", str(training), *words
    )
    assert code == 0, output
    (path,) = (tmp_path / "run" / "evaluation").glob("*/evaluation.json")
    metrics = json.loads(path.read_text())["metrics"]
    assert metrics["denoiser_error_by_sigma/0.4"] > 0
    assert 0 <= metrics["memorization/mask_auc"] <= 1
    assert Image.open(path.parent / "samples.png").width > 10 * 32


def test_a_run_without_clean_images_is_judged_by_observations(
    train: Train, tmp_path: Path, shards: Path, held_out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("run", "steps=2")[0] == 0
    run, measured = tmp_path / "run", tmp_path / "measured"
    shard(str(held_out), measured, Measured(0.4), size=16)
    words = ["--measured", str(measured), "--number", "12", "--steps", "4"]
    code, output = evaluate(capfd, str(run), *words)
    assert code == 0, output
    assert "KID, observed" in output
    (path,) = (run / "evaluation").glob("*/evaluation.json")
    kept = json.loads(path.read_text())
    assert {name.partition("/")[0] for name in kept["metrics"]} == {"measured"}
    assert kept["curve"] is None
    assert {p.name for p in path.parent.glob("*.png")} == {"samples.png", "observed.png", "measured.png"}
    page = (path.parent / "report.html").read_text()
    assert "number of held-out observations: 20" in page
    assert "noisy as measured, sigma_n 0.4, as given" in page
    assert "made with corruption" in output, "and the training's was drawn"
    shutil.rmtree(measured)
    shard(str(held_out), measured, Measured(0.44), size=16)  # the same pixels
    assert evaluate(capfd, str(run), *words)[0] == 0
    found = {path.read_text() for path in (run / "evaluation").glob("*/evaluation.json")}
    assert len({json.loads(text)["metrics"]["measured/kid"] for text in found}) == 2, "the level counts, too"
    both = ["--reference", str(held_out), *words]
    assert evaluate(capfd, str(run), *both)[0] == 0
    assert len(list((run / "evaluation").glob("*/evaluation.json"))) == 3, "another request"
    code, output = evaluate(capfd, str(run), "--measured", str(shards), *words[2:])
    assert code == 0
    assert f"--measured {shards}: {run} was trained on these images: nothing here is held out" in output
    for wrong, told in (
        ([], "--reference is missing: give clean images that training never saw or, if there are none, --measured"),
        (["--measured", str(measured), "--number", "0"], "--number 0: --measured compares samples"),
        (["--measured", str(measured), "--training", str(held_out)], "needs --reference"),
        (["--measured", str(tmp_path / "nowhere")], "no such shard folder"),
    ):
        code, output = evaluate(capfd, str(run), *wrong)
        assert (code, output.count("\n")) == (2, 1), output
        assert told in output


MISTAKES = [
    (["--number", "3"], "--number 3: must be at least 10, or 0"),
    (["--attacked", "2"], "--attacked 2: must be at least 10"),
    (["--attack-visible", "1"], "--attack-visible 1: must be above 0 and below 1"),
    (["--attack-sigma", "2"], "--attack-sigma 2: needs --training"),
    (["--attack-sigma", "500", "--training", "x"], "--attack-sigma 500: must be between 0.05 and 20"),
    (["--levels", "0.1", "-3"], "--levels -3: must be above 0"),
    (["--levels", "90"], "--levels 90: none is from 0.05 to 20"),
    (["--extractor", "inception.pt"], "--extractor inception.pt: no such file or folder"),
    (["--prompt", "x"], "--prompt x: needs a run with text"),
    (["--out", "report.pdf"], "--out report.pdf: must be a file that ends in .html"),
    (["--steps", "1"], "--steps 1: must be at least 2"),
    (["--checkpoint", "77"], "77"),
    (["--training", "nowhere"], "nowhere: no such folder or file"),
]


def test_a_mistake_is_one_line_before_anything_is_drawn(
    train: Train, tmp_path: Path, held_out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("run", "steps=1")[0] == 0
    for words, told in MISTAKES:
        code, output = evaluate(capfd, str(tmp_path / "run"), "--reference", str(held_out), *words)
        assert code == 2, words
        assert told in output
        assert output.count("\n") == 1, output
        assert not (tmp_path / "run" / "evaluation").exists()


def test_shards_are_not_taken_for_clean_images(
    train: Train, tmp_path: Path, shards: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("run", "steps=1")[0] == 0
    code, output = evaluate(capfd, str(tmp_path / "run"), "--reference", str(shards))
    assert code == 2
    assert f"--reference {shards}: these are shards of observations" in output


def test_runs_that_saw_other_images_are_not_compared_in_silence(
    train: Train, tmp_path: Path, held_out: Path, pictures: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And MLflow has the figures of the last evaluation, also of one that is read back."""
    assert train("one", "steps=1", "logging.enabled=true")[0] == train("two", "steps=1")[0] == 0
    runs = [str(tmp_path / name) for name in ("one", "two")]
    few = ["--reference", str(held_out), "--number", "10", "--steps", "2", "--levels", "1"]
    more = [*few, "--number", "12"]
    assert "cannot be compared" not in evaluate(capfd, *runs, *few)[1]
    page = tmp_path / "comparison.html"
    assert "a setting in which they differ" not in page.read_text()
    assert "replaces an older one" in evaluate(capfd, *runs, *few)[1]
    evaluations = [next((tmp_path / name / "evaluation").glob("*/evaluation.json")) for name in ("one", "two")]
    one, two = (read(path.parent) for path in evaluations)
    assert one
    assert two
    other = replace(two, settings=two.settings | {"number": 99, "reference_hash": "other"})
    told = incomparable([one, other])
    assert told == (
        "one and two: their results cannot be compared, because these differ in kind, number or size: held-out "
        "clean images, samples drawn"
    )
    assert "a setting in which they differ" in report(
        [(one, evaluations[0].parent), (other, evaluations[1].parent)], "again"
    )

    def folder_in_mlflow() -> str:
        client, experiment = connect(LoggingConfig(), tmp_path / "one")
        (found,) = [r for r in client.search_runs([experiment]) if r.info.run_name == "one"]
        return found.data.tags["evaluation.folder"]

    first = folder_in_mlflow()
    evaluate(capfd, runs[0], *more)
    assert folder_in_mlflow() != first
    evaluate(capfd, runs[0], *few)
    assert folder_in_mlflow() == first


def test_images_that_were_trained_on_are_not_taken_for_held_out(
    train: Train, tmp_path: Path, pictures: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("run", "steps=1")[0] == 0
    code, output = evaluate(
        capfd, str(tmp_path / "run"), "--reference", str(pictures), "--number", "0", "--levels", "1"
    )
    assert code == 0
    assert "was trained on these images: nothing here is held out" in output
    code, output = evaluate(capfd, str(tmp_path / "run"), "--reference", "x", "--training", "x")
    assert code == 2
    assert "is also given as --reference" in output


@pytest.mark.long
def test_while_training_the_distance_of_samples_is_logged_with_each_grid(
    train: Train, tmp_path: Path, held_out: Path
) -> None:
    code, output = train("run", "steps=2", "logging.sample_every=2", f"logging.reference={held_out}")
    assert code == 0, output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (logged,) = [record["metrics"] for record in records if "samples/kid" in record.get("metrics", {})]
    run, extractor = restore(tmp_path / "run"), open_extractor(PACKAGED)
    images = generate(run.denoiser, 256, run.state.shape, seed=0, steps=18, sampler="ddim", progress=False)
    reference = Images("held out", open_source(str(held_out)), run.state.shape, 20)
    distance, error = kid(extractor.features(images), extractor.features(reference.rows(range(20))))
    assert logged == pytest.approx({"samples/kid": distance, "samples/kid_error": error}, rel=1e-3)
    code, output = train("other", "logging.sample_every=2", "logging.reference=nowhere")
    assert code == 2
    assert "nowhere: no such folder or file" in output
    code, output = train("other", "logging.reference=nowhere")
    assert code == 2
    assert "logging" in output
    assert "set sample_every above 0" in output


@pytest.mark.long
def test_jobs_of_a_cluster_find_what_one_process_finds(
    train: Train, tmp_path: Path, held_out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        assert train(name, "steps=1", f"optimizer.lr={1e-3 if name == 'a' else 1e-2}")[0] == 0
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(f"kind: local\nlogs: {tmp_path / 'jobs'}\n")
    words = ["--reference", str(held_out), "--number", "10", "--steps", "2", "--levels", "0.4"]
    (tmp_path / "b" / "evaluation").write_text("in the way")
    code, output = evaluate(
        capfd, *(str(tmp_path / name) for name in "ab"), *words, "--cluster", str(cluster), command=by_jobs
    )
    assert code == 1
    assert f"1 of 2 evaluations failed: {tmp_path / 'b'}: " in output
    (path,) = tmp_path.glob("?/evaluation/step-*/evaluation.json")
    by_job = json.loads(path.read_text())
    path.unlink()
    assert evaluate(capfd, str(tmp_path / "a"), *words)[0] == 0
    assert json.loads(path.read_text())["metrics"] == pytest.approx(by_job["metrics"], rel=1e-5)
