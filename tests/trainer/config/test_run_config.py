"""A configuration is checked whole, and what is wrong with it is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ambient_core import errors
from ambient_core.errors import UserError
from ambient_core.parsing import flatten
from tests.conftest import ROOT, TINY
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
    ("override", "expected"),
    [
        ("optimizer.lrr=1", "optimizer.lrr: no such field; did you mean lr?"),
        ("nonsense=1", "nonsense: no such field"),
        ("model.rank=4", "the command line: model.rank: no such field; did you mean model.lora.rank?"),
        ("model.base=x", "model.base: no such field; it is one of kind sdxl, which model.kind is not"),
        ("lr=1e-3", "lr: no such field; did you mean optimizer.lr?"),
        ("steps=-3", "error: the command line: steps -3: must be at least 1"),
        ("steps=1e3", "error: the command line: steps: '1e3': must be a whole number"),
        ("levels={kind: log_normal, std: 0}", "mean must be finite, and std above 0"),
        ("process={kind: vp_table, steps: 0}", "steps of at least 2"),
        ("process={kind: vp_cosine, offset: -1}", "offset must be at least 0 and below 1"),
        ("process={kind: ve, sigma_data: .nan}", "sigma_data must be above 0"),
        ("weight={kind: min_snr, gamma: -1}", "weight: gamma -1: gamma must be above 0"),
        ("recovery.leave_out=true", "recovery.leave_out: True: must be a number"),
        ("data.sigma_scale=true", "data.sigma_scale: True: must be a number"),
        ("process.sigma_mn=1", "process.sigma_mn: no such field; did you mean sigma_min?"),
        ("steps=many", "error: the command line: steps: 'many': must be a whole number"),
        ("data.flip=ja", "error: the command line: data.flip: 'ja': must be true or false"),
        ("model={layers: 1.5}", "error: the command line: model.layers: 1.5: must be a whole number"),
        ("steps=0", "must be at least 1"),
        ("optimizer.lr=-1", "need lr > 0"),
        ("prediction=velocity", "prediction: 'velocity': "),
        ("process.kind=vee", "process.kind: 'vee': must be one of ve, vp_table, vp_cosine, flow; did you mean ve?"),
        ("model=null", "model: None: must be a mapping of fields to values; there are "),
        ("recovery=3", "recovery: 3: must be a mapping of fields to values; there are leave_out, roll_back, spike"),
        ("engine.adam=8bits", "engine.adam: '8bits': must be 'torch', 'cpu' or '8bit'; did you mean 8bit?"),
        ("engine.zero_stage=4", "engine.zero_stage: 4: "),
        ("data.sigma_scale=-1", "need sigma_scale >= 0"),
        ("data.sigma_scale=0", "set consistency to null"),
        ("consistency.period=0", "need period >= 1"),
        ("consistency.ratio=1.5", "need 0 < ratio < 1"),
        ("consistency.overhead_budget=0.2", "give overhead_budget, or period and count, not both"),
        ("consistency={overhead_budget: 0}", "overhead_budget 0 must be above 0, such as 0.2"),
        ("consistency.steps=0", "pool_depth, steps and batch_size must be at least 1"),
        ("consistency.where=above", "consistency.where: 'above': "),
        ("consistency.batch_size=3", "consistency.batch_size 3 must divide batch_size 8"),
        ("ambient.boundary_share=2", "need 0 <= boundary_share <= 1"),
        ("ambient.boundary_ratio=1", "boundary_ratio above 1.005"),
        ("ambient.pair=true", "ambient.pair: no such field; did you mean pairs?"),
        ("engine.precision=fp8", "engine.precision: 'fp8': "),
        ("process.sigma_min=-0.1", "need 0 < sigma_min < sigma_max"),
        ("model.channels=[10, 20]", "must be multiples of norm_groups"),
        ("model.attention=[2]", "must name resolutions 0 to 1"),
        ("ema.decay=1.5", "ema: decay 1.5: need 0 <= decay < 1"),
        ("ema.sigma_rel=0.4", "ema: sigma_rel 0.4: need sigma_rel above 0 and below 0.28"),
        ("checkpoint.keep=0", "keep 0: need every >= 1 and keep >= 1"),
        ("checkpoint.keep_every=4", "keep_every 4 must be a multiple of every 3"),
        ("checkpoint.keep_best={}", "checkpoint.keep_best.metric: must be given"),
        ("logging.every=0", "need every >= 1"),
        ("data.shards={nowhere}", "no such shard folder"),
        ("model.head_dim=0", "must be at least 1"),
        ("optimizer.betas=[2, 2]", "need betas from 0 to below 1"),
        ("seed=-1", "seed -1 must be from 0"),
        ("consistency.weight=.nan", "a finite weight >= 0"),
        ("optimizer", "an override is key.path=value"),
        ("=3", "an override is key.path=value"),
        ("steps=[", "is not a YAML value"),
        ("batch_size=7", "batch_size 7: must be a multiple of the 2 ranks"),
        ("micro_batch_size=3", "micro_batch_size 3: must divide the 4 samples"),
        ("process.sigma_max=0.3", "process.sigma_max 0.3: must be above the data's highest sigma_n 0.4"),
        ("model.channels=[8,8,8,8,8,8]", "image sides must be multiples of 32"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_code_2(
    override: str,
    expected: str,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from trainer.engine import distributed
    from trainer.engine.distributed import Ranks

    two_ranks = "batch" in override
    monkeypatch.setattr(distributed, "init", lambda: Ranks(0, 2 if two_ranks else 1, torch.device("cpu")))
    override = override.replace("{nowhere}", str(tmp_path / "nowhere"))
    arguments = [str(TINY), f"data.shards={shards}", f"run_dir={tmp_path / 'run'}", override]
    assert errors.run(lambda: main(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert expected in lines[-1]
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: [", "not YAML"),
        ("- 1", "must be a mapping"),
        ("steps: 3", "run_dir: must be given"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_file_is_one_line(text: str | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
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
    with pytest.raises(UserError, match=r"a\.yaml: optimizer\.lr: 'fast': must be a number"):
        load(tmp_path / "a.yaml", ["steps=3", "optimizer.clip=1"])
    with pytest.raises(UserError, match=r"the command line: optimizer\.lr"):
        load(tmp_path / "a.yaml", ["optimizer.lr=slow"])
