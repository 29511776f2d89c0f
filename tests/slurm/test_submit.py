"""Submissions: what is refused before anything is sent, what is sent, and trainings as jobs on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ambient_core import errors
from ambient_core.errors import UserError
from slurm import snapshot, status, submit
from slurm.cluster import ClusterConfig
from slurm.job.attempts import read
from slurm.job.queue import is_alive
from slurm.points import points
from slurm.preflight import problems, refused_by_slurm, without_slurm_fields
from tests.conftest import ROOT, TINY, Outcome
from tests.waiting import until

Call = Callable[..., Outcome]


@pytest.fixture
def call(shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Call:
    """`slurm.submit` of the tiny training to this machine; fields: of the cluster's file."""

    def run(*arguments: str, cluster: str = "kind: local") -> Outcome:
        path = tmp_path / "cluster.yaml"
        path.write_text(f'{cluster}\nlogs: {tmp_path / "jobs"}\nenvironment: {{OMP_NUM_THREADS: "1"}}\n')
        overrides = [f"data.shards={shards}", f"run_dir={tmp_path / 'run'}", *arguments]
        capfd.readouterr()
        code = errors.run(lambda: submit.main([str(TINY), "--cluster", str(path), *overrides]))
        return code, "".join(capfd.readouterr())

    return run


def job_of(run_dir: Path) -> str:
    return json.loads((run_dir / "job.json").read_text())["job"]


def ended(run_dir: Path) -> bool:
    with suppress(ChildProcessError):  # it is this process's child, as submit ran in it
        os.waitpid(int(job_of(run_dir)), os.WNOHANG)
    return not is_alive(job_of(run_dir))


def wait(run_dir: Path) -> None:
    until(lambda: ended(run_dir), f"an end of the job of {run_dir}")


def wait_for(file: Path, run_dir: Path) -> None:
    """Which the job of a run is to write."""
    until(lambda: (file.is_file() and file.stat().st_size) or ended(run_dir), f"{file}", every=0.02)
    assert not ended(run_dir)


@pytest.mark.long
@pytest.mark.distributed
def test_a_job_on_this_machine_loses_a_rank_goes_on_and_is_one_run_of_the_code_as_submitted(
    call: Call, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    code, output = call("steps=30", "checkpoint.every=5", cluster="kind: local\ntasks_per_node: 2")
    assert code == 0, output
    assert f"job {job_of(run_dir)}: {run_dir}" in output
    assert f"cancel  kill {job_of(run_dir)}" in output
    wait_for(run_dir / "checkpoints" / "latest", run_dir)
    pid = json.loads((read(run_dir)[0].folder / "rank-1.json").read_text())["pid"]
    os.kill(pid, signal.SIGSTOP)  # so that it does not end before it is killed
    code, output = call("steps=30")
    assert code == 2
    assert f"job {job_of(run_dir)} uses it: cancel the job, or choose another run_dir" in output
    assert Path(f"/proc/{pid}/cwd").resolve() == ROOT, "relative paths mean what they meant to the user"
    os.kill(pid, signal.SIGKILL)
    wait(run_dir)
    first, second = read(run_dir)
    assert first.decision
    assert first.decision.follows == "another start"
    assert second.step >= 5
    assert second.decision
    assert second.decision.reason == "step 30: done"
    assert errors.run(lambda: status.main([str(run_dir)])) == 0
    text = capfd.readouterr().out
    assert f"{run_dir}: COMPLETED, step 30 of 30 (100%), loss/ambient " in text
    assert "killed: ranks 1 ended without a record" in text
    assert errors.run(lambda: status.main([str(run_dir), "--json"])) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["state"], found["step"], found["steps"]) == ("COMPLETED", 30, 30)
    assert [start["step"] for start in found["starts"]] == [first.step, second.step]
    assert found["starts"][0]["follows"] == "another start"


@pytest.mark.long
def test_a_job_on_this_machine_that_is_killed_saves_and_stays_down(call: Call, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert call("steps=100000", "checkpoint.every=100000")[0] == 0
    wait_for(run_dir / "metrics.jsonl", run_dir)
    os.kill(int(job_of(run_dir)), signal.SIGTERM)  # what the submission said
    wait(run_dir)
    (start,) = read(run_dir)
    assert start.decision
    assert start.decision.step >= 1
    assert (
        start.decision.reason
        == f"step {start.decision.step}: interrupted, and saved; by a signal: submit it again to resume"
    )


def test_the_code_that_runs_is_the_code_at_submission(tmp_path: Path) -> None:
    code = snapshot.copy_code(tmp_path / "code")
    program = (
        "import trainer.train, slurm.job.training, data_pipeline; print(trainer.train.__file__, "
        "slurm.job.training.__file__)"
    )
    result = subprocess.run(
        ["python3", "-c", program],
        cwd=code,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"},
    )
    assert result.stdout.split() == [str(code / "trainer" / "train.py"), str(code / "slurm" / "job" / "training.py")], (
        result
    )


def test_the_difference_to_git_has_new_and_changed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("old\n")
    for command in (
        ["init", "-q"],
        ["add", "a.txt"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(snapshot, "ROOT", tmp_path)
    assert snapshot.changes() == ""
    (tmp_path / "a.txt").write_text("new\n")
    (tmp_path / "b.txt").write_text("born\n")
    (tmp_path / "large.bin").write_bytes(bytes(snapshot.LARGE + 1))
    text = snapshot.changes()
    for line in ("-old", "+new", "+born", "new file, too large to be shown: large.bin"):
        assert line in text.splitlines()
    staged = subprocess.run(["git", "status", "--porcelain"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert staged.stdout.split() == ["M", "a.txt", "??", "b.txt", "??", "large.bin"], "the user's index is untouched"


@pytest.mark.parametrize(
    ("arguments", "cluster", "message"),
    [
        (["data.shards=nowhere"], "", "nowhere: no such shard folder"),
        (
            ["batch_size=3"],
            "tasks_per_node: 2",
            "batch_size 3: must be a multiple of the 2 ranks (1 nodes with 2 ranks each)",
        ),
        (["run_dir=/proc/run"], "", "run_dir /proc/run: cannot be written"),
        (
            ["logging.enabled=true", "logging.tracking_uri=http://127.0.0.1:9"],
            "",
            "logging.tracking_uri http://127.0.0.1:9: does not answer",
        ),
        (["model.channels=[8,8,8,8,8,8]"], "", "model.channels"),
        (["batch_size=99", "consistency=null"], "gpus_per_node: 99", "gpus_per_node 99: this machine has"),
        (["model.chanels=[8]"], "", "did you mean channels?"),
        (["--sweep", "seed"], "", "--sweep seed: must be key.path=a,b,c"),
        (["--sweep", "seed=1,1"], "", "--sweep: two points are named seed=1"),
        (["--sweep", "seed=1", "--sweep", "seed=2"], "", "--sweep seed: is given twice"),
        (["--sweep", "run_dir=a,b"], "", "--sweep run_dir: each point has a folder of its own"),
        (["--nodes", "2"], "", "--nodes 2: nodes 2: kind local has one node"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_sent(
    arguments: list[str], cluster: str, message: str, call: Call, tmp_path: Path
) -> None:
    code, output = call(*arguments, cluster=f"kind: local\n{cluster}")
    assert code == 2, output
    assert sum(line.startswith("error: ") for line in output.splitlines()) == 1, output
    assert message in output
    assert not (tmp_path / "jobs").exists()
    assert not (tmp_path / "run").exists()


def test_all_that_is_wrong_is_said_at_once(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wrong = ["data.shards=nowhere", "batch_size=3", f"run_dir={tmp_path / 'file' / 'run'}"]
    cluster = ClusterConfig("local", tasks_per_node=2, logs=str(tmp_path / "file"))
    found = problems(points(TINY, wrong, []), cluster)
    assert [line.split()[0] for line in found] == ["run_dir", "batch_size", "nowhere:", "logs"]


def test_a_torn_shard_and_another_run_are_found(train: Call, shards: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(shards, tmp_path / "torn")
    os.truncate(tmp_path / "torn" / "shard-000003.tar", 3000)
    assert train("old", "steps=1")[0] == 0
    overrides = [f"data.shards={tmp_path / 'torn'}", f"run_dir={tmp_path / 'old'}", "optimizer.lr=0.5"]
    found = problems(points(TINY, overrides, []), ClusterConfig("local", logs=str(tmp_path)))
    assert any("shard-000003.tar has 3000 bytes, not " in line for line in found)
    assert any("choose another run_dir" in line for line in found)


def test_a_database_that_is_there_already_is_no_problem_and_one_that_cannot_be_is(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("")
    overrides = [f"data.shards={shards}", f"run_dir={tmp_path / 'run'}", "logging.enabled=true"]
    assert problems(points(TINY, overrides, []), ClusterConfig("local", logs=str(tmp_path))) == []
    wrong = [*overrides, f"logging.tracking_uri=sqlite:///{tmp_path / 'mlflow.db' / 'mlflow.db'}"]
    (line,) = problems(points(TINY, wrong, []), ClusterConfig("local", logs=str(tmp_path)))
    assert line == f"logging.tracking_uri {tmp_path / 'mlflow.db'}: cannot be written: Not a directory"


def test_a_run_that_does_not_fit_into_what_is_asked_for_is_a_problem(shards: Path, tmp_path: Path) -> None:
    wide = ["model.channels=[256,512]", "batch_size=512", f"data.shards={shards}", f"run_dir={tmp_path / 'run'}"]
    (point,) = points(TINY, wide, [])

    def found(**fields: Any) -> list[str]:
        return problems([point], ClusterConfig("slurm", logs=str(tmp_path), **fields))

    (line,) = found(mem_gb=2, tasks_per_node=2)
    assert line.startswith("mem_gb 2: 2 ranks on a node take about ")
    needed = float(line.split("about ")[1].split()[0])
    assert found(mem_gb=needed + 0.1, tasks_per_node=2) == []
    assert found(tasks_per_node=2) == [], "nothing is asked for, so nothing can be too little"
    (line,) = found(gpus_per_node=1, gpu="b100")
    assert line.startswith("gpu b100: must be one of h100, ")
    assert found(gpus_per_node=1, gpu="h100") == []
    (line,) = found(gpus_per_node=1, gpu="h100", mem_gb=0.5)
    assert line.startswith("mem_gb 0.5: 1 ranks on a node take about ")
    assert "a checkpoint that is being written" in line
    (huge,) = points(TINY, [*wide, "batch_size=16384"], [])
    (line,) = problems([huge], ClusterConfig("slurm", logs=str(tmp_path), gpus_per_node=1, gpu="l4"))
    assert (
        "l4 has only 22 GB for it: the nearest setting that fits is 1 x l4, engine.zero_stage=0, micro_batch_size="
        in line
    )


def test_a_server_that_answers_is_no_problem(shards: Path, tmp_path: Path) -> None:
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...  # pyright: ignore[reportIncompatibleMethodOverride]

    server = HTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{server.server_port}"
    overrides = [
        f"data.shards={shards}",
        f"run_dir={tmp_path / 'run'}",
        "logging.enabled=true",
        f"logging.tracking_uri={uri}",
    ]
    try:
        assert problems(points(TINY, overrides, []), ClusterConfig("local", logs=str(tmp_path))) == []
    finally:
        server.shutdown()
        server.server_close()


def test_a_sweep_is_a_run_for_each_combination(shards: Path, tmp_path: Path) -> None:
    found = points(
        TINY,
        [f"run_dir={tmp_path}", f"data.shards={shards}"],
        ["optimizer.lr=3e-4,0.001", "model.channels=[8,16],[16,16]"],
    )
    assert [(p.config.optimizer.lr, getattr(p.config.model, "channels", None)) for p in found] == [
        (3e-4, (8, 16)),
        (3e-4, (16, 16)),
        (1e-3, (8, 16)),
        (1e-3, (16, 16)),
    ]
    assert [p.run_dir.name for p in found][1:3] == ["lr=3e-4,channels=-16,-16-", "lr=0.001,channels=-8,-16-"]
    assert found[0].config.logging.name == found[0].run_dir.name
    assert all(p.run_dir.parent == tmp_path for p in found)


def test_a_dry_run_says_what_would_be_done_and_leaves_nothing(call: Call, tmp_path: Path) -> None:
    code, output = call(
        "--dry-run",
        "--sweep",
        "seed=0,1",
        "batch_size=8",
        "micro_batch_size=2",
        cluster="kind: local\ntasks_per_node: 2",
    )
    assert code == 0, output
    assert "2 jobs of 1 nodes x 2 ranks, 60 minutes each, started again at most 5 times" in output
    assert f"{tmp_path / 'run' / 'seed=1'}: steps 0 to 6, batch 8 = 2 x 2 micro-batches x 2 ranks" in output
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "jobs").exists()


def test_a_file_for_slurm_serves_this_machine_with_local(tmp_path: Path) -> None:
    slurm = ClusterConfig("slurm", nodes=4, min_nodes=2, setup=("module load x",), cpus_per_task=3, max_requeues=9)
    local, unused = without_slurm_fields(slurm)
    assert (local.kind, local.nodes, local.setup, local.cpus_per_task, local.requeues) == ("local", 1, (), 3, 5)
    assert sorted(unused) == ["min_nodes", "nodes", "setup"]


def test_a_folder_without_a_submission_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing was submitted for it: no job\.json in it"):
        status.main([str(tmp_path)])


def test_a_run_that_is_done_is_not_submitted_again(shards: Path, tmp_path: Path) -> None:
    saved = tmp_path / "run" / "checkpoints" / "step-00000006"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text('{"step": 6}')
    (saved.parent / "latest").write_text(saved.name)
    overrides = [f"run_dir={tmp_path / 'run'}", f"data.shards={shards}"]
    cluster = ClusterConfig("local", logs=str(tmp_path))
    (line,) = problems(points(TINY, [*overrides, "steps=6"], []), cluster)
    assert line == f"run_dir {tmp_path / 'run'}: its 6 steps are done: raise steps, or choose another"
    assert problems(points(TINY, [*overrides, "steps=7"], []), cluster) == []


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host",
            "no SLURM answers: is SLURM_CONF set",
        ),
        (
            "allocation failure: Requested node configuration is not available",
            "the cluster refuses the job: allocation failure: Requested node",
        ),
    ],
)
def test_what_sbatch_says_is_passed_on(said: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert str(refused_by_slurm("#!/bin/sh\n")).startswith(told)
