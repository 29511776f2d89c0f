"""Progress in a log file is a line now and then."""

from __future__ import annotations

import sys

import pytest

from ambient_core import progress
from tests.waiting import HANG_S


def test_a_log_gets_the_first_and_the_last_line_of_short_work(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "IN_A_LOG", HANG_S)
    with progress.progress_bar(total=5000, desc="work", unit="img") as bar:
        for _ in range(5000):
            bar.update()
            bar.set_postfix(rejected=1, refresh=False)
    said = capfd.readouterr().err
    assert "\r" not in said
    first, last = said.splitlines()
    assert first.startswith("work:   0%")
    assert last.startswith("work: 100%")
    assert "5000/5000" in last
    assert "rejected=1" in last


def test_long_work_says_where_it_is(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "IN_A_LOG", 0.0)
    with progress.progress_bar(total=10, desc="work", miniters=1) as bar:
        for _ in range(10):
            bar.update()
    assert [line.split("|")[2].split()[0] for line in capfd.readouterr().err.splitlines()][:10] == [
        f"{n}/10" for n in range(10)
    ]


def test_a_message_stands_on_a_line_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar(total=2, desc="work") as bar:
        bar.write("a message", file=sys.stderr)
        bar.update(2)
    assert "a message" in capfd.readouterr().err.splitlines()
