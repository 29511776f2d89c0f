"""Cluster files are read strictly; jobs on this machine, by submitit, write the very bytes of one process."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from ambient_core import errors
from ambient_core.errors import Code, WorkFailed
from data_pipeline.corruption.corruption import Gaussian
from data_pipeline.shard import shard
from slurm.cluster import ClusterConfig, Surroundings, executor, read_cluster, submit
from slurm.shard import by_jobs, main
from tests.conftest import ROOT
from tests.refusals import refused
from tests.waiting import until


@pytest.fixture
def local(tmp_path: Path) -> ClusterConfig:
    return ClusterConfig("local", logs=str(tmp_path / "jobs"))


def test_two_jobs_write_the_bytes_of_one_process(
    local: ClusterConfig, pictures: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    cluster = replace(local, cpus_per_task=2, environment={"OMP_NUM_THREADS": "1"})
    shard(str(pictures), out, Gaussian(0.4), shard_size=8, write=by_jobs(cluster, 2))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in shards.iterdir()}
    (folder,) = (tmp_path / "jobs").iterdir()
    said = capsys.readouterr().err
    assert f"logs in {folder}" in said
    assert all(log.name.split("_")[0] in said for log in folder.glob("*.out")), "job ids"
    assert len(list(folder.glob("*.out"))) == 2


def visible_gpus() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.long
@pytest.mark.parametrize(
    ("gpus", "visible", "expected"), [(0, None, None), (0, "4,5,6", "4,5,6"), (2, "4,5,6", "4,5"), (2, None, "0,1")]
)
def test_a_job_on_this_machine_sees_the_gpus_of_its_user(
    gpus: int, visible: str | None, expected: str | None, local: ClusterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    made = executor(replace(local, gpus_per_node=gpus), Path(local.logs), "look", Surroundings(code=ROOT))
    (job,) = submit(made, [visible_gpus])
    assert job.result() == expected


def test_a_failed_job_is_named_with_its_log_and_only_what_is_missing_is_submitted_again(
    local: ClusterConfig, pictures: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second job fails, because a folder stands where it would write its first shard."""
    out = tmp_path / "out"
    (out / "shard-000001.tar").mkdir(parents=True)
    with pytest.raises(WorkFailed, match=r"1 of 2 jobs left 4 shards out.*Is a directory.*run again"):
        shard(str(pictures), out, Gaussian(0.4), shard_size=8, write=by_jobs(local, 2))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("job ")]
    assert "IsADirectoryError" in line
    log = Path(line.rpartition("log ")[2])
    assert "Traceback" in log.read_text()
    assert {p.name for p in out.glob("*.json")} == {"plan.json", *(f"shard-00000{n}.json" for n in (0, 2, 4, 6))}
    before = {n: (out / f"shard-00000{n}.tar").stat().st_mtime_ns for n in (0, 2, 4, 6)}
    (out / "shard-000001.tar").rmdir()
    shard(str(pictures), out, Gaussian(0.4), shard_size=8, write=by_jobs(local, 2))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in shards.iterdir()}
    assert before == {n: (out / f"shard-00000{n}.tar").stat().st_mtime_ns for n in (0, 2, 4, 6)}


def test_jobs_are_cancelled_when_too_many_images_are_rejected(
    local: ClusterConfig, pictures: Path, tmp_path: Path
) -> None:
    (source := tmp_path / "source").mkdir()
    for path in sorted(pictures.iterdir())[:16]:
        shutil.copy(path, source)
    (source / "disc 02.png").write_bytes(b"")
    with pytest.raises(WorkFailed, match=r"1 of 16 images were rejected, .* the first is disc 02_png: "):
        shard(str(source), tmp_path / "out", Gaussian(0.4), shard_size=1, size=256, write=by_jobs(local, 2))

    def running() -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]

    until(lambda: not running(), "an end of the jobs' processes")


def test_a_cluster_that_is_not_here_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with refused("kind", "dependency"):
        executor(ClusterConfig("slurm"), tmp_path, "name")


def test_the_script_for_slurm_asks_for_what_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("srun", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    example = read_cluster(ROOT / "configs" / "clusters" / "example.yaml")
    config = replace(
        example,
        account="us",
        qos="low",
        constraint="a100|h100",
        mem_gb=1.5,
        gpus_per_node=2,
        srun_args=("--container-image=/a b",),
    )
    text = executor(config, tmp_path / "jobs", "shard")._make_submission_file_text("COMMAND", "1")
    for line in (
        "--partition=main",
        "--account=us",
        "--qos=low",
        "--constraint='a100|h100'",
        "--mem=1536MB",
        "--gpus-per-node=2",
        "--cpus-per-task=16",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--time=240",
        "--signal=USR2@120",
        "--job-name=shard",
    ):
        assert f"#SBATCH {line}" in text
    setup = text.index("source .venv/bin/activate")
    assert setup < text.index("export OMP_NUM_THREADS=1") < text.index("COMMAND")
    assert "--container-image=/a b" in text.replace("'", "")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "clusters").iterdir()), ids=lambda path: path.name)
def test_the_files_that_come_with_the_project_are_read(path: Path) -> None:
    assert read_cluster(path).kind == ("local" if path.name == "local.yaml" else "slurm")


@pytest.mark.parametrize(
    ("text", "field", "mistake"),
    [
        ("[", "cluster.yaml", "unreadable"),
        ("- a", "cluster.yaml", "unreadable"),
        ("partition: main", "kind", "missing"),
        ("kind: pbs", "kind", "unknown"),
        ("kind: slurm\npartitoin: main", "partitoin", "unknown"),
        ("kind: slum", "kind", "unknown"),
        ("kind: slurm\nzzz: 1", "zzz", "unknown"),
        ("kind: slurm\nnodes: two", "nodes", "invalid"),
        ("kind: slurm\nnodes: true", "nodes", "invalid"),
        ("kind: slurm\nnodes: null", "nodes", "invalid"),
        ("kind: slurm\nnodes: 0", "nodes", "invalid"),
        ("kind: slurm\nnodes: .nan", "nodes", "invalid"),
        ("kind: slurm\nmem_gb: true", "mem_gb", "invalid"),
        ("kind: slurm\nmem_gb: .nan", "mem_gb", "invalid"),
        ("kind: slurm\nmem_gb: 0", "mem_gb", "invalid"),
        ("kind: slurm\nmem_gb: .inf", "mem_gb", "invalid"),
        ("kind: slurm\nhang_minutes: .nan", "hang_minutes", "invalid"),
        (
            "kind: local\npartition: main",
            "partition",
            "invalid",
        ),
        ("kind: slurm\ntime_minutes: 1\nsignal_delay_s: 60", "signal_delay_s", "invalid"),
        ("kind: slurm\nsetup: module load", "setup", "invalid"),
        ("kind: slurm\nsetup: {a: b}", "setup", "invalid"),
        ("kind: slurm\nsetup: [1]", "setup.0", "invalid"),
        ("kind: slurm\nenvironment: {A: 1}", "environment.A", "invalid"),
        ("kind: slurm\nenvironment: {A: yes}", "environment.A", "invalid"),
        ("kind: slurm\nenvironment: [A]", "environment", "invalid"),
        ("kind: slurm\nmin_nodes: 3\nnodes: 2", "min_nodes", "invalid"),
        ("kind: slurm\ntasks_per_node: 0", "tasks_per_node", "invalid"),
        ("kind: slurm\nhang_minutes: -1", "hang_minutes", "invalid"),
        ("kind: local\nmax_requeues: 6", "max_requeues", "invalid"),
        ("kind: local\nmin_nodes: 1", "min_nodes", "invalid"),
        ("kind: local\nnodes: 2", "nodes", "invalid"),
        ("kind: local\nsetup: [module load]", "setup", "invalid"),
    ],
)
def test_a_wrong_cluster_file_is_one_line(text: str, field: str, mistake: Code, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with refused(field, mistake) as caught:
        read_cluster(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--cluster", "{tmp}/none.yaml"], "none.yaml: cannot be read: No such"),
        (["--cluster", "{cluster}", "--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--cluster", "{cluster}", "--workers", "2"], "cpus_per_task"),
        ([], "the following arguments are required: --cluster"),
    ],
)
def test_a_wrong_request_for_jobs_is_one_line(
    words: list[str], expected: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = ROOT / "configs" / "clusters" / "local.yaml"
    filled = [word.format(tmp=tmp_path, cluster=cluster) for word in words]

    def command() -> int:
        try:
            return main([str(pictures), str(tmp_path / "out"), "--sigma", "0.5", *filled])
        except SystemExit as ended:
            return int(ended.code or 0)

    assert errors.run(command) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert expected in message
    assert not (tmp_path / "out").exists()


def test_the_console_script_submits_where_a_cluster_is_given(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer import cli

    words = [str(pictures), str(tmp_path / "out"), "--sigma", "0.5", "--cluster", str(tmp_path / "none.yaml")]
    assert errors.run(lambda: cli.main(["shard", *words])) == 2
    assert "none.yaml: cannot be read" in capsys.readouterr().err
