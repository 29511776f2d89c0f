"""`python -m slurm.submit CONFIG --cluster FILE`: submits a training as a job, or a sweep as a job array."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ambient_core import errors
from ambient_core.arguments import Parser
from ambient_core.errors import UserError
from ambient_core.parsing import from_json, text_of
from slurm.cluster import ClusterConfig, Surroundings, executor, new_logs, read_cluster, script, submit

EXAMPLE = """examples:
  python -m slurm.submit configs/quickstart.yaml --cluster cluster.yaml run_dir=runs/digits steps=20000
  python -m slurm.submit configs/quickstart.yaml --cluster cluster.yaml --sweep optimizer.lr=1e-3,3e-3 --sweep seed=0,1
  python -m slurm.submit configs/quickstart.yaml --cluster configs/clusters/local.yaml
  python -m slurm.status runs/digits          # how far it is

A run that is submitted again with the same run_dir resumes from its last checkpoint, on any number of nodes.
"""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m slurm.submit",
        description="Submits a training, which resumes by itself after the time limit or a preemption.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "config", metavar="CONFIG", type=Path, help="configuration of the training, a YAML file; see configs/"
    )
    p.add_argument(
        "overrides",
        metavar="key.path=value",
        nargs="*",
        default=[],
        help="replaces a field of CONFIG, such as steps=100",
    )
    p.add_argument("--cluster", type=Path, metavar="FILE", required=True, help="a YAML file as in configs/clusters/")
    p.add_argument("--nodes", type=int, metavar="N", help="number of nodes, instead of the file's")
    p.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="key.path=A,B,C",
        help="submit a run for each value; if given several times, for each combination of values",
    )
    p.add_argument("--resume", action="store_true", help="submit only the runs that are neither done nor in a job")
    p.add_argument("--dry-run", action="store_true", help="only check, and print what would be submitted")
    p.add_argument("--local", action="store_true", help="run on this machine, instead of on the file's cluster")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    cluster = _cluster(args)
    from slurm import (
        points,
        preflight,  # imported here, because these imports take seconds, which --help should not
    )

    found = points.points(args.config, args.overrides, args.sweep)
    if args.resume:
        found = [point for point in found if not point.done and not point.job]
        if not found:
            print("nothing to submit: all runs are done, or in a job")
            return errors.DONE
    found = [replace(point, config=_fixed(point.config, cluster)) for point in found]
    wrong = preflight.problems(found, cluster)
    submission = Submission(cluster, found, new_logs(cluster, "train"))
    if cluster.kind == "slurm" and not wrong and (refused := preflight.refused_by_slurm(submission.script)):
        wrong = [refused]
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if wrong:
        return errors.BAD_REQUEST
    print(submission.plan)
    if args.dry_run:
        print(f"\n{submission.script}" if cluster.kind == "slurm" else "")
        return errors.DONE
    submission.send()
    return errors.DONE


def _cluster(args: argparse.Namespace) -> ClusterConfig:
    cluster = read_cluster(args.cluster)
    if args.nodes is not None:
        try:
            cluster = replace(cluster, nodes=args.nodes)
        except ValueError as error:
            raise UserError(f"--nodes {args.nodes}: {error}", field="--nodes", code="invalid") from None
    if args.local and cluster.kind != "local":
        from slurm.preflight import without_slurm_fields

        cluster, unused = without_slurm_fields(cluster)
        if unused:
            print(f"--local: {', '.join(unused)} of {args.cluster} have no meaning on this machine", file=sys.stderr)
    return cluster


def _fixed(config: Any, cluster: ClusterConfig) -> Any:
    """Returns the configuration with a fixed micro-batch size, if the job may resume with fewer nodes. It is the size
    on all nodes, so that fewer nodes take more micro-batches per step, and not more memory."""
    if cluster.min_nodes in (None, cluster.nodes) or config.micro_batch_size:
        return config
    ranks = cluster.nodes * cluster.ranks_per_node
    if config.batch_size % ranks:
        return config  # preflight reports it
    micro = config.batch_size // ranks
    print(
        f"micro_batch_size {micro}: as on {ranks} ranks, so that fewer ranks take more micro-batches per step",
        file=sys.stderr,
    )
    return replace(config, micro_batch_size=micro)


@dataclass(frozen=True)
class Submission:
    """A submission of one job for each point, in one array. points: the runs, `slurm.points.Point`. folder: a new
    folder for the jobs' files."""

    cluster: ClusterConfig
    points: list[Any]
    folder: Path

    def _executor(self) -> Any:
        code = self.folder / "code"
        again = shlex.join(["env", "-C", str(code), sys.executable, "-m", "slurm.job.requeue", str(self.folder)])
        around = Surroundings(
            tasks=self.cluster.ranks_per_node,
            code=code,
            before=("trap : TERM  # this script outlives the ranks",),
            after=("code=$?", f"{again} $code", "exit $?"),
            # If a rank dies, srun ends the others, which would wait for it. Logs of earlier starts are kept.
            srun_args=("--kill-on-bad-exit=1", "--open-mode=append"),
        )
        return executor(self.cluster, self.folder, "train", around)

    @property
    def script(self) -> str:
        """The batch script for sbatch."""
        return script(self._executor(), len(self.points))

    @property
    def plan(self) -> str:
        from trainer.checkpoint.progress import steps_done

        cluster, lines = self.cluster, list[str]()
        nodes = f"{cluster.min_nodes}-{cluster.nodes}" if cluster.min_nodes else str(cluster.nodes)
        lines.append(
            f"{len(self.points)} job{'s' if len(self.points) > 1 else ''} of {nodes} nodes x "
            f"{cluster.ranks_per_node} ranks, "
            f"{cluster.time_minutes} minutes each, started again at most {cluster.requeues} times"
        )
        for point in self.points:
            c, ranks = point.config, cluster.nodes * cluster.ranks_per_node
            layout = c.layout(0, ranks)
            lines.append(
                f"  {point.run_dir}: steps {steps_done(point.run_dir)} to {c.steps}, batch {c.batch_size} = "
                f"{layout.micro_batch_size} x {layout.accumulation} micro-batches x {ranks} ranks"
            )
        return "\n".join(lines)

    def send(self) -> None:
        """Copies the code, submits the jobs, and prints how to follow them."""
        from slurm import snapshot
        from trainer.config.run_config import to_data
        from trainer.tracking.provenance import revision

        snapshot.copy_code(self.folder / "code")
        changes = snapshot.changes()
        tags = {"git.revision": revision(), **self._parent()}
        jobs = [self._job(to_data(point.config), point, tags, changes) for point in self.points]
        runs = [str(point.run_dir) for point in self.points]
        (self.folder / "job.json").write_text(json.dumps({"runs": runs, "max_requeues": self.cluster.requeues}))
        made = self._executor()
        with _detached(self.folder / "controller.log") if self.cluster.kind == "local" else nullcontext():
            handles = submit(made, jobs)
        for point, handle in zip(self.points, handles, strict=True):
            note = {
                "job": handle.job_id,
                "kind": self.cluster.kind,
                "folder": str(self.folder),
                "submitted": time.time(),
                "max_requeues": self.cluster.requeues,
            }
            (point.run_dir / "job.json").write_text(json.dumps(note))
            print(f"job {handle.job_id}: {point.run_dir}")
        ids = list(dict.fromkeys(h.job_id.partition("_")[0] for h in handles))
        shown = self.points[0].run_dir if len(self.points) == 1 else self.points[0].run_dir.parent
        log = handles[0].paths.stderr
        print(f"logs    {self.folder}")
        print(f"follow  python -m slurm.status {shlex.quote(str(shown))}; tail -F {shlex.quote(str(log))}")
        print(f"cancel  {'kill' if self.cluster.kind == 'local' else 'scancel'} {' '.join(ids)}")

    def _job(self, config: dict[str, Any], point: Any, tags: dict[str, str], changes: str) -> Any:
        from slurm.job.training import TrainingJob

        point.run_dir.mkdir(parents=True, exist_ok=True)
        path = point.run_dir / "changes.diff"
        if changes:
            path.write_text(changes)
        else:
            path.unlink(missing_ok=True)
        cluster = self.cluster
        values = {f"sweep.{v.partition('=')[0]}": v.partition("=")[2] for v in point.values}
        return TrainingJob(config, os.getcwd(), {**tags, **values}, 60 * cluster.hang_minutes, cluster.requeues)

    def _parent(self) -> dict[str, str]:
        """Returns the tag that makes a point a child of the sweep's MLflow run, or nothing without a sweep. The MLflow
        run is made once for a run directory."""
        point = self.points[0]
        if not point.values or not point.config.logging.enabled:
            return {}
        base = point.run_dir.parent
        base.mkdir(parents=True, exist_ok=True)
        path = base / "sweep.json"
        if not path.is_file():
            from trainer.tracking.client import heading

            logging = replace(point.config.logging, name=base.name)
            path.write_text(json.dumps({"parent": heading(logging, base, {"sweep.folder": str(base)}, "slurm.submit")}))
        return {"mlflow.parentRunId": from_json(text_of(path))["parent"]}


@contextmanager
def _detached(log: Path) -> Iterator[None]:
    """Within it, processes that are started write to the log and not to this command's output. Otherwise a
    program that reads this command's output through a pipe would wait for them."""
    kept = [os.dup(1), os.dup(2)]
    sys.stdout.flush()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        for target, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, target)
            os.close(descriptor)


if __name__ == "__main__":
    sys.exit(errors.run(main))
