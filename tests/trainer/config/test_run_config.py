"""A configuration is checked whole, and what is wrong with it is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ambient_core.errors import Code, UserError
from ambient_core.parsing import flatten
from tests.conftest import ROOT, TINY
from tests.refusals import refusal, refused, run
from trainer.config.run_config import RunConfig, load, parse, to_data, to_yaml
from trainer.train import main

CONFIGS = sorted(
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name != "clusters" and "\nmethods:" not in path.read_text()  # those are studies, see test_study.py
)


@pytest.mark.parametrize("path", [TINY, *CONFIGS], ids=lambda p: p.name)
def test_every_file_loads_and_its_resolved_form_loads_back_equal(path: Path) -> None:
    config = load(path)
    assert parse(yaml.safe_load(to_yaml(config)), "again") == config
    assert dict(flatten(to_data(config)))["optimizer.lr"] == config.optimizer.lr


def test_overrides_replace_single_fields_and_a_new_kind_replaces_the_old_ones_fields() -> None:
    config = load(TINY, ["optimizer.lr=3e-4", "process.kind=vp_table", "consistency=null", "run_dir=a b"])
    assert config.optimizer.lr == 3e-4
    assert config.optimizer.warmup_steps == 2
    assert config.process.kind == "vp_table"
    assert config.consistency is None
    assert config.run_dir == "a b"


def test_a_base_is_one_level(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(TINY.read_text())
    (tmp_path / "child.yaml").write_text("base: base.yaml\noptimizer: {lr: 0.5}\n")
    (tmp_path / "grandchild.yaml").write_text("base: child.yaml\n")
    assert load(tmp_path / "child.yaml").optimizer.lr == 0.5
    assert load(tmp_path / "child.yaml").optimizer.warmup_steps == 2
    with pytest.raises(UserError, match="one level only"):
        load(tmp_path / "grandchild.yaml")


@pytest.mark.parametrize(
    ("override", "field", "mistake"),
    [
        ("optimizer.lrr=1", "optimizer.lrr", "unknown"),
        ("nonsense=1", "nonsense", "unknown"),
        ("model.rank=4", "model.rank", "unknown"),
        ("model.base=x", "model.base", "unknown"),
        ("lr=1e-3", "lr", "unknown"),
        ("steps=-3", "steps", "invalid"),
        ("steps=1e3", "steps", "invalid"),
        ("levels={kind: log_normal, std: 0}", "levels", "invalid"),
        ("process={kind: vp_table, steps: 0}", "process", "invalid"),
        ("process={kind: vp_cosine, offset: -1}", "process", "invalid"),
        ("process={kind: ve, sigma_data: .nan}", "process", "invalid"),
        ("weight={kind: min_snr, gamma: -1}", "weight", "invalid"),
        ("recovery.leave_out=true", "recovery.leave_out", "invalid"),
        ("data.sigma_scale=true", "data.sigma_scale", "invalid"),
        ("process.sigma_mn=1", "process.sigma_mn", "unknown"),
        ("steps=many", "steps", "invalid"),
        ("data.flip=ja", "data.flip", "invalid"),
        ("model={layers: 1.5}", "model.layers", "invalid"),
        ("steps=0", "steps", "invalid"),
        ("optimizer.lr=-1", "optimizer", "invalid"),
        ("prediction=velocity", "prediction", "unknown"),
        ("process.kind=vee", "process.kind", "unknown"),
        ("model=null", "model", "invalid"),
        ("recovery=3", "recovery", "invalid"),
        ("engine.adam=8bits", "engine.adam", "unknown"),
        ("engine.zero_stage=4", "engine.zero_stage", "unknown"),
        ("data.sigma_scale=-1", "data", "invalid"),
        ("data.sigma_scale=0", "data.sigma_scale=0", "invalid"),
        ("consistency.period=0", "consistency", "invalid"),
        ("consistency.ratio=1.5", "consistency", "invalid"),
        ("consistency.overhead_budget=0.2", "consistency", "invalid"),
        ("consistency={overhead_budget: 0}", "consistency", "invalid"),
        ("consistency.steps=0", "consistency", "invalid"),
        ("consistency.where=above", "consistency.where", "unknown"),
        ("consistency.batch_size=3", "consistency.batch_size", "invalid"),
        ("ambient.boundary_share=2", "ambient", "invalid"),
        ("ambient.boundary_ratio=1", "ambient", "invalid"),
        ("ambient.pair=true", "ambient.pair", "unknown"),
        ("engine.precision=fp8", "engine.precision", "unknown"),
        ("process.sigma_min=-0.1", "process", "invalid"),
        ("model.channels=[10, 20]", "model", "invalid"),
        ("model.attention=[2]", "model", "invalid"),
        ("ema.decay=1.5", "ema", "invalid"),
        ("ema.sigma_rel=0.4", "ema", "invalid"),
        ("checkpoint.keep=0", "checkpoint", "invalid"),
        ("checkpoint.keep_every=4", "checkpoint", "invalid"),
        ("checkpoint.keep_best={}", "checkpoint.keep_best.metric", "missing"),
        ("logging.every=0", "logging", "invalid"),
        ("data.shards={nowhere}", "nowhere", "not_found"),
        ("model.head_dim=0", "model", "invalid"),
        ("optimizer.betas=[2, 2]", "optimizer", "invalid"),
        ("seed=-1", "seed", "invalid"),
        ("consistency.weight=.nan", "consistency", "invalid"),
        ("optimizer", "override", "invalid"),
        ("=3", "override", "invalid"),
        ("steps=[", "override", "invalid"),
        ("batch_size=7", "batch_size", "invalid"),
        ("micro_batch_size=3", "micro_batch_size", "invalid"),
        ("process.sigma_max=0.3", "process.sigma_max", "mismatch"),
        ("model.channels=[8,8,8,8,8,8]", "model.channels", "mismatch"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_code_2(
    override: str,
    field: str,
    mistake: Code,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from trainer.engine import distributed
    from trainer.engine.distributed import Ranks

    two_ranks = "batch" in override
    monkeypatch.setattr(distributed, "init", lambda *_: Ranks(0, 2 if two_ranks else 1, torch.device("cpu")))
    override = override.replace("{nowhere}", str(tmp_path / "nowhere"))
    arguments = [str(TINY), f"data.shards={shards}", f"run_dir={tmp_path / 'run'}", override]
    assert run(lambda: main(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert refusal() == (field, mistake)
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize(
    ("text", "field", "mistake"),
    [
        ("steps: [", "config.yaml", "unreadable"),
        ("- 1", "config.yaml", "unreadable"),
        ("steps: 3", "run_dir", "missing"),
        (None, "config.yaml", "unreadable"),
    ],
)
def test_a_wrong_file_is_one_line(text: str | None, field: str, mistake: Code, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with refused(field, mistake) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_unknown_fields_are_refused_at_any_depth() -> None:
    data = to_data(load(TINY))
    for part in [name for name, value in data.items() if isinstance(value, dict)]:
        with pytest.raises(UserError, match="no such field"):
            parse({**data, part: {**data[part], "surprise": 1}}, "file")
    assert isinstance(parse(data, "file"), RunConfig)


def test_the_file_is_named_where_the_value_is_from_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("run_dir: a\ndata: {shards: b}\noptimizer: {lr: fast}\n")
    with refused("optimizer.lr", "invalid"):
        load(tmp_path / "a.yaml", ["steps=3", "optimizer.clip=1"])
    with refused("optimizer.lr", "invalid"):
        load(tmp_path / "a.yaml", ["optimizer.lr=slow"])
