"""Studies: the grid, a whole one in small, going on after a failure, and mistakes in the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ambient_core import errors
from tests.conftest import ROOT, TINY
from trainer.config.run_config import load, load_as
from trainer.reports.study_config import StudyConfig
from trainer.study import Study, main


@pytest.fixture
def study_file(tmp_path: Path, pictures: Path) -> Path:
    held_out = tmp_path / "held-out"
    held_out.mkdir()
    for path in sorted(pictures.iterdir())[40:]:
        (held_out / path.name).write_bytes(path.read_bytes())
    data = {
        "config": str(TINY),
        "training": str(pictures),
        "reference": str(held_out),
        "shard": "--shard-size 8 --limit 40",
        "data": {"clean": "--sigma 0", "sigma 0.4": "--sigma 0.4"},
        "overrides": ["steps=2", "consistency=null"],
        "methods": {"oracle": {"data": "clean"}, "ambient": {}},
        "seeds": 1,
        "evaluate": {"number": 10, "memorization": False, "steps": 2, "levels": [0.4, 1]},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def change(path: Path, **fields: object) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **fields}))


@pytest.mark.long
def test_a_study_goes_from_data_to_a_table_and_on_after_a_failure(
    study_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study"
    words = [str(study_file), "--folder", str(folder), "--at-once", "2"]
    broken = folder / "ambient-sigma-0.4-0" / "checkpoints"
    broken.parent.mkdir(parents=True)
    broken.write_text("in the way")
    assert errors.run(lambda: main(words)) == 1
    printed = capfd.readouterr()
    assert "1 of 2 runs failed: ambient-sigma-0.4-0 (see" in printed.err
    table = (folder / "table.md").read_text()
    assert "| clean | oracle | 1 |" in table
    assert "ambient" not in table
    broken.unlink()
    seen = (folder / "oracle-clean-0" / "metrics.jsonl").stat().st_mtime_ns
    assert errors.run(lambda: main(words)) == 0
    assert (folder / "oracle-clean-0" / "metrics.jsonl").stat().st_mtime_ns == seen, "what is done is left alone"
    table = (folder / "table.md").read_text()
    assert "| sigma 0.4 | ambient | 1 |" in table
    runs = {run["method"]: run for run in json.loads((folder / "table.json").read_text())["runs"]}
    assert set(runs) == {"oracle", "ambient"}
    for name, run in runs.items():
        (kept,) = (folder / f"{name}-{'clean' if name == 'oracle' else 'sigma-0.4'}-0" / "evaluation").glob(
            "step-*/*.json"
        )
        assert json.loads(kept.read_text())["metrics"] == run["metrics"]
    assert (folder / "plots.png").stat().st_size > 1000
    assert "oracle-clean-0" in (folder / "comparison.html").read_text()
    capfd.readouterr()
    assert errors.run(lambda: main([*words, "--dry-run"])) == 0
    assert "2 of 2 runs are done" in capfd.readouterr().out


def test_the_grid_has_each_method_on_each_data_set_but_an_oracle_on_its_own(study_file: Path) -> None:
    change(
        study_file,
        data={"clean": "--sigma 0", "a": "--sigma 0.1", "b": "--sigma 0.2"},
        methods={"oracle": {"data": "clean", "seeds": 1}, "x": {}},
        seeds=2,
    )
    points = load_as(StudyConfig, study_file).points()
    assert [point.name for point in points] == ["oracle-clean-0", "x-a-0", "x-b-0", "x-a-1", "x-b-1"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"methods": {"m": {"data": "blurred"}}},
            "methods.m.data blurred: is none of the data sets, which are clean, sigma 0.4",
        ),
        ({"methods": {"m": {"override": []}}}, "methods.m.override: no such field; did you mean overrides?"),
        ({"seeds": 0}, ": must be at least 1"),
        ({"data": {"clean": "--corruption bluer:1"}}, "did you mean blur?"),
        ({"evaluate": {"number": 3}}, "evaluate: number 3: must be at least 10, or 0 for no samples"),
        ({"methods": {"a b": {}, "a-b": {}}}, "two runs would have the folder a-b-clean-0: rename one of them"),
        ({"data": {"a/b": ""}}, "the name 'a/b' must consist of letters"),
        ({"evaluate": {"number": "many"}}, "evaluate.number: 'many': "),
        ({"methods": {"m": {"overrides": ["optimizer.rate=1"]}}}, "optimizer.rate: no such field"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml: cannot be read"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(
    study_file: Path, fields: dict[str, object], told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change(study_file, **fields)
    assert errors.run(lambda: main([str(study_file), "--folder", str(tmp_path / "study")])) == 2
    printed = capfd.readouterr()
    assert told in printed.err
    assert (printed.out + printed.err).count("\n") == 1
    assert not (tmp_path / "study").exists()


def test_a_misspelt_word_of_the_sharding_ends_it_before_anything_is_made(
    study_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change(study_file, data={"clean": "--sgma 0"})
    with pytest.raises(SystemExit) as ended:
        main([str(study_file), "--folder", str(tmp_path / "study"), "--dry-run"])
    assert ended.value.code == 2
    assert "did you mean --sigma?" in capfd.readouterr().err
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("name", ["fashion", "memorization", "corruptions", "noise-level", "late-start"])
def test_the_studies_that_come_with_it_are_sound(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from data_pipeline.shard import parser

    monkeypatch.chdir(ROOT)
    config = load_as(StudyConfig, Path("configs/studies") / f"{name}.yaml")
    study = Study(config, tmp_path)
    for point in config.points():
        load(Path(config.config), study.overrides(point))
    for words in config.data.values():
        parser().parse_args(["in", "out", *config.shard.split(), *words.split()])
