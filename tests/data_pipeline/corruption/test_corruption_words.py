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
from ambient_core.errors import UserError
from data_pipeline.corruption.arguments import add_arguments, from_arguments
from data_pipeline.corruption.corruption import Corruption, Degraded, Gaussian, Measured, describe, parse_corruption
from data_pipeline.corruption.degradations import KINDS
from data_pipeline.corruption.noise_levels import parse_levels
from data_pipeline.format.index import read_index
from data_pipeline.shard import main


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
    ("flags", "message"),
    [
        ("", "--sigma is missing: --corruption gaussian takes a number"),
        ("--sigma loud", "--sigma loud: must be a number, several joined by commas"),
        ("--sigma -0.5", "--sigma -0.5: must be a finite number, at least 0"),
        ("--sigma inf", "--sigma inf: must be a finite number"),
        ("--sigma 0.1,,0.2", "--sigma 0.1,,0.2: must be a number"),
        ("--sigma 0.1,2000", "float16 observations hold sigma up to 1000"),
        ("--sigma uniform:0.4:0.1", "LOW must be below HIGH"),
        ("--sigma uniform:0.4", "write uniform:LOW:HIGH"),
        ("--sigma log-uniform:0:1", "LOW must be above 0"),
        ("--sigma timestep:1000", "--sigma timestep:1000: a timestep of SDXL is a whole number from 0 to 999"),
        ("--sigma timestep:1.5", "a whole number from 0 to 999"),
        ("--sigma estimate", "only with --corruption measured"),
        ("--sigma 0.2 --clean-share nan", "--clean-share nan: must be from 0 to 1"),
        ("--sigma 0.2 --effective-sigma 0.1", "--effective-sigma 0.1: the level of --corruption gaussian is known"),
        ("--corruption measured", "--sigma is missing: --corruption measured takes a number, or estimate"),
        ("--corruption measured --sigma 0", "--sigma 0: must be above 0"),
        ("--corruption measured --sigma 0.1,0.2", "--sigma 0.1,0.2: --corruption measured takes a number above 0"),
        (
            "--corruption measured --sigma 0.1 --clean-share 0.1",
            "--clean-share 0.1: --corruption measured has no clean images",
        ),
        ("--corruption measured --sigma 0.1 --effective-sigma 1", "leave it out"),
        ("--corruption measured+blur:2", "--corruption measured+blur:2: measured: measured stands alone"),
        ("--corruption bluer:2", "--corruption bluer:2: no such corruption; there are gaussian, salt-and-pepper"),
        ("--corruption Poisson:2", "did you mean poisson?"),
        ("--corruption zebra", "no such corruption; there are gaussian"),
        ("--corruption blur:1++jpeg:5", "--corruption blur:1++jpeg:5: an empty part: no such corruption"),
        ("--corruption blur", "--corruption blur: write blur:RADIUS, a number from 0.1 to 100"),
        ("--corruption blur:0", "--corruption blur:0: RADIUS in pixels must be a number from 0.1 to 100"),
        ("--corruption poisson", "write poisson:PEAK, a number from 0.01 to 1e+09"),
        ("--corruption poisson:nan", "PEAK, the photon count at white must be a number"),
        ("--corruption jpeg:50.5", "QUALITY must be a whole number from 1 to 100"),
        ("--corruption blur:1+jpeg:0", "--corruption blur:1+jpeg:0: jpeg:0: QUALITY"),
        ("--corruption downsample:1", "FACTOR must be a whole number from 2 to 256"),
        ("--corruption box-mask:1.5", "SHARE of the area must be a number from 1e-06 to 0.999"),
        ("--corruption salt-and-pepper:x", "SHARE of the pixels must be a number"),
        ("--corruption blur:1+gaussian", "gaussian: write gaussian:SIGMA"),
        ("--corruption blur:1+gaussian:-1", "gaussian:-1: must be a finite number, at least 0"),
        (
            "--corruption blur:1 --sigma 0.1",
            "--sigma 0.1: not used by --corruption blur:1; noise is a step: blur:1+gaussian:0.1",
        ),
        ("--corruption gaussian:0.2 --sigma 0.1", "--sigma 0.1: not used by --corruption gaussian:0.2"),
        ("--corruption blur:1 --effective-sigma 0", "--effective-sigma 0: must be above 0, up to 1000"),
    ],
)
def test_wrong_flags_are_one_line(flags: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        asked(*flags.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_estimate_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(
        UserError, match=r"--sigma estimate: needs scikit-image.*pip install 'ambient-trainer\[measured\]'"
    ):
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
