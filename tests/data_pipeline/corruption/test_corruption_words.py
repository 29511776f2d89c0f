"""The words of --corruption and --sigma: what they mean, and one line for each that is wrong."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambient_core import errors
from ambient_core.errors import Code, UserError
from data_pipeline.corruption.arguments import add_arguments, from_arguments
from data_pipeline.corruption.corruption import Corruption, Degraded, Gaussian, Measured, describe, parse_corruption
from data_pipeline.corruption.degradations import KINDS
from data_pipeline.corruption.noise_levels import parse_levels
from data_pipeline.format.index import read_index
from data_pipeline.shard import main
from tests.refusals import refused


def asked(*flags: str) -> Corruption:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_arguments(parser.parse_args(flags))


@pytest.mark.parametrize(
    ("flags", "expected", "line"),
    [
        ("--sigma 0.20", Gaussian(0.2), "Gaussian noise, sigma 0.2"),
        ("--corruption gaussian:0.2", Gaussian(0.2), "Gaussian noise, sigma 0.2"),
        ("--sigma 0", Gaussian(0.0), "Gaussian noise, sigma 0"),
        (
            "--sigma 0.1,0.20 --clean-share 0.3",
            Gaussian("0.1,0.2", 0.3),
            "Gaussian noise, sigma one of 0.1, 0.2, 30 % of the images clean",
        ),
        ("--sigma uniform:0.1:0.4", Gaussian("uniform:0.1:0.4"), "Gaussian noise, sigma uniform from 0.1 to 0.4"),
        (
            "--corruption gaussian:log-uniform:.05:.5",
            Gaussian("log-uniform:0.05:0.5"),
            "Gaussian noise, sigma log-uniform from 0.05 to 0.5",
        ),
        ("--sigma timestep:500", Gaussian("timestep:500"), "Gaussian noise, sigma 1.618 (SDXL timestep 500)"),
        ("--corruption measured --sigma 0.1", Measured(0.1), "noisy as measured, sigma_n 0.1, as given"),
        (
            "--corruption measured --sigma estimate",
            Measured("estimate"),
            "noisy as measured, sigma_n estimated image by image",
        ),
        (
            "--corruption blur:2.0+poisson:30+gaussian:0.10",
            Degraded("blur:2+poisson:30+gaussian:0.1"),
            "blur:2, then poisson:30, then gaussian:0.1, sigma_n the rms of x_n - x0",
        ),
        (
            "--corruption jpeg:50 --effective-sigma 0.1",
            Degraded("jpeg:50", effective_sigma=0.1),
            "jpeg:50, sigma_n 0.1, as given",
        ),
    ],
)
def test_flags_become_a_corruption_in_canonical_form(flags: str, expected: Corruption, line: str) -> None:
    found = asked(*flags.split())
    assert found == expected
    assert describe(found) == line
    assert json.loads(json.dumps(asdict(found))) == asdict(found), "index.json gives back what was asked for"
    assert asdict(found).get("sigma_n_origin", "exact").partition(":")[0] in ("exact", "rms", "given", "estimated")


@pytest.mark.parametrize(
    ("flags", "field", "mistake"),
    [
        ("", "--sigma", "missing"),
        ("--sigma loud", "--sigma", "invalid"),
        ("--sigma -0.5", "--sigma", "invalid"),
        ("--sigma inf", "--sigma", "invalid"),
        ("--sigma 0.1,,0.2", "--sigma", "invalid"),
        ("--sigma 0.1,2000", "--sigma", "invalid"),
        ("--sigma uniform:0.4:0.1", "--sigma", "invalid"),
        ("--sigma uniform:0.4", "--sigma", "invalid"),
        ("--sigma log-uniform:0:1", "--sigma", "invalid"),
        ("--sigma timestep:1000", "--sigma", "invalid"),
        ("--sigma timestep:1.5", "--sigma", "invalid"),
        ("--sigma estimate", "--sigma", "conflict"),
        ("--sigma 0.2 --clean-share nan", "--clean-share", "invalid"),
        ("--sigma 0.2 --effective-sigma 0.1", "--effective-sigma", "conflict"),
        ("--corruption measured", "--sigma", "missing"),
        ("--corruption measured --sigma 0", "--sigma", "invalid"),
        ("--corruption measured --sigma 0.1,0.2", "--sigma", "invalid"),
        (
            "--corruption measured --sigma 0.1 --clean-share 0.1",
            "--clean-share",
            "conflict",
        ),
        ("--corruption measured --sigma 0.1 --effective-sigma 1", "--effective-sigma", "conflict"),
        ("--corruption measured+blur:2", "--corruption", "conflict"),
        ("--corruption bluer:2", "--corruption", "unknown"),
        ("--corruption Poisson:2", "--corruption", "unknown"),
        ("--corruption zebra", "--corruption", "unknown"),
        ("--corruption blur:1++jpeg:5", "--corruption", "unknown"),
        ("--corruption blur", "--corruption", "invalid"),
        ("--corruption blur:0", "--corruption", "invalid"),
        ("--corruption poisson", "--corruption", "invalid"),
        ("--corruption poisson:nan", "--corruption", "invalid"),
        ("--corruption jpeg:50.5", "--corruption", "invalid"),
        ("--corruption blur:1+jpeg:0", "--corruption", "invalid"),
        ("--corruption downsample:1", "--corruption", "invalid"),
        ("--corruption box-mask:1.5", "--corruption", "invalid"),
        ("--corruption salt-and-pepper:x", "--corruption", "invalid"),
        ("--corruption blur:1+gaussian", "--corruption", "invalid"),
        ("--corruption blur:1+gaussian:-1", "--corruption", "invalid"),
        (
            "--corruption blur:1 --sigma 0.1",
            "--sigma",
            "conflict",
        ),
        ("--corruption gaussian:0.2 --sigma 0.1", "--sigma", "conflict"),
        ("--corruption blur:1 --effective-sigma 0", "--effective-sigma", "invalid"),
    ],
)
def test_wrong_flags_are_one_line(flags: str, field: str, mistake: Code) -> None:
    with refused(field, mistake):
        asked(*flags.split())


def test_an_estimate_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with refused("--sigma", "dependency"):
        asked("--corruption", "measured", "--sigma", "estimate")


sigmas = st.floats(1e-4, 1000)
one_step = st.sampled_from(sorted(KINDS)).flatmap(
    lambda name: (
        st.integers(int(KINDS[name].low), int(KINDS[name].high))
        if KINDS[name].whole
        else st.floats(KINDS[name].low, KINDS[name].high)
    ).map(lambda value: f"{name}:{value}")
)


@given(st.lists(one_step, min_size=1, max_size=4))
def test_canonical_steps_are_read_back_as_themselves(steps: list[str]) -> None:
    found = parse_corruption("+".join(steps))
    assert isinstance(found, Degraded)
    assert parse_corruption(found.steps) == found
    values = [float(step.partition(":")[2]) for step in steps]
    assert [float(step.partition(":")[2]) for step in found.steps.split("+")] == values, "to the last digit"


@given(
    st.one_of(
        st.lists(sigmas, min_size=1, max_size=5).map(lambda values: ",".join(map(str, values))),
        st.lists(st.integers(0, 999), min_size=1).map(lambda steps: "timestep:" + ",".join(map(str, steps))),
        st.tuples(st.sampled_from(["uniform", "log-uniform"]), sigmas, st.floats(1.1, 9)).map(
            lambda t: f"{t[0]}:{t[1] / 10}:{t[1] / 10 * t[2]}"
        ),
    )
)
def test_canonical_levels_are_read_back_as_themselves(words: str) -> None:
    levels = parse_levels(words)
    assert parse_levels(levels.words) == levels
    found = parse_corruption("gaussian", sigma=words)
    assert isinstance(found, Gaussian)
    assert found.levels == levels


@given(st.text(max_size=12), st.text(max_size=12) | st.none())
def test_any_words_are_understood_or_refused(words: str, sigma: str | None) -> None:
    with contextlib.suppress(UserError):
        parse_corruption(words, sigma=sigma)


def test_the_command_writes_the_corruption_and_the_origin_of_its_levels(pictures: Path, tmp_path: Path) -> None:
    arguments = [str(pictures), str(tmp_path / "out"), "--corruption", "blur:1+gaussian:0.1,0.3", "--limit", "4"]
    for _ in range(2):  # the second finds that all is there
        assert errors.run(lambda: main(arguments)) == 0
    request = read_index(tmp_path / "out").request["corruption"]
    assert request == asdict(Degraded("blur:1+gaussian:0.1,0.3"))
    assert b'"sigma_n_origin": "rms"' in (tmp_path / "out" / "shard-000000.tar").read_bytes()
    other = [*arguments[:3], "blur:1+gaussian:0.1,0.4", *arguments[4:]]
    assert errors.run(lambda: main(other)) == 2
