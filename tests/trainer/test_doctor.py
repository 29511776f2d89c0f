"""The doctor finds what works, and what was broken on purpose."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from ambient_core import errors
from tests.waiting import HANG_S
from trainer import doctor
from trainer.tracking import provenance


def test_this_machine_can_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "SECONDS", HANG_S)
    assert errors.run(lambda: doctor.main(["--shared", str(tmp_path)])) == 0
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line[6:22].strip(): line[:4].strip() for line in lines if line[:4].strip() in ("ok", "warn", "fail")}
    assert {"packages", "bf16", "attention fp32", "communication", "shared folder"} <= verdicts.keys()
    assert verdicts["communication"] == verdicts["shared folder"] == verdicts["packages"] == "ok"
    assert lines[-1] == "nothing failed"
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"
    for line, following in pairwise(lines):
        if line.startswith(("warn", "fail")):
            assert "->" in following, "what to do"


def test_a_missing_package_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    for name in ("devices", "arithmetic", "compiled", "attention", "communication"):
        monkeypatch.setattr(doctor, name, lambda: iter(()))
    assert errors.run(lambda: doctor.main([])) == 1
    printed = capsys.readouterr().out
    assert "fail  packages         missing: no-such-package" in printed
    assert printed.splitlines()[-1] == "something failed"
    assert errors.run(lambda: doctor.main(["--json"])) == 1
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (first["name"], first["verdict"], first["detail"]) == ("packages", "fail", "missing: no-such-package")
    assert "make install" in first["advice"]


def test_a_folder_that_is_not_there_fails(tmp_path: Path) -> None:
    (found,) = doctor.shared_folder(tmp_path / "nowhere")
    assert (found.verdict, found.detail) == ("fail", f"{tmp_path / 'nowhere'}: No such file or directory")


def test_locks_that_exclude_nobody_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "fcntl", SimpleNamespace(lockf=lambda file, how: None, LOCK_EX=2))
    (found,) = doctor.shared_folder(tmp_path)
    assert found.verdict == "warn"
    assert "two processes can lock one file" in found.detail
    assert not list(tmp_path.iterdir())


def test_processes_that_do_not_meet_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECONDS", 0.01)
    (found,) = doctor.communication()
    assert (found.verdict, found.name) == ("fail", "communication")


def test_a_server_that_is_not_there_fails_in_one_line() -> None:
    (found,) = doctor.tracking("http://127.0.0.1:9")
    assert found.verdict == "fail"
    assert found.detail.startswith("http://127.0.0.1:9: ")
    assert "\n" not in found.detail


def test_only_deepspeed_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training can do without the other kernels."""
    for name in ("triton", "bitsandbytes", "deepspeed"):
        monkeypatch.setitem(sys.modules, name, None)
    verdicts = {finding.name: finding.verdict for finding in doctor.compiled()}
    assert verdicts["triton"] == verdicts["bitsandbytes"] == "warn"
    assert verdicts["deepspeed"] == "fail"


def test_the_time_is_read_after_what_gloo_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo of torch 2.10 prints lines of its own on the same stream."""
    printed = "[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\n0.237\n"
    process = SimpleNamespace(communicate=lambda timeout: (printed, ""), kill=lambda: None, returncode=0)
    monkeypatch.setattr(doctor.subprocess, "Popen", lambda *words, **options: process)
    (finding,) = doctor.communication()
    assert (finding.verdict, finding.detail) == ("ok", "gloo, 2 processes on this machine sum 0.237 GB/s")
