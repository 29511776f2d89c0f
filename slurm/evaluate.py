"""`python -m slurm.evaluate`: evaluates runs by jobs of a cluster, one job for each run, in one array. The results are
read when all jobs have ended."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ambient_core import errors
from ambient_core.errors import WorkFailed
from ambient_core.progress import progress_bar
from slurm.cluster import ClusterConfig, Resumable, failure_of, read_cluster, submit_independent, wait
from trainer.evaluate import check, parser_of_request, report_on, request_of, weights_of
from trainer.evaluation.request import Request

if TYPE_CHECKING:
    from trainer.reports.evaluate_runs import Weights

EXAMPLE = """example:
  python -m slurm.evaluate runs/* --reference held-out/ --cluster cluster.yaml

The options are those of trainer.evaluate, and --cluster. The metrics are added to the MLflow run of each training run,
and a report, one HTML file, is written into its folder.
"""


def parser() -> argparse.ArgumentParser:
    p = parser_of_request("python -m slurm.evaluate", EXAMPLE)
    p.add_argument(
        "--cluster",
        type=Path,
        metavar="FILE",
        required=True,
        help="a YAML file as in configs/clusters/; a job for each run",
    )
    return p


@dataclass(frozen=True)
class EvaluationJob(Resumable):
    """The evaluation of one run; see `evaluate_runs.evaluate`. If the job is started again, it uses the samples that it
    has already drawn."""

    run: Path
    request: Request
    extractor: str
    command: str
    weights: Weights

    def __call__(self) -> None:
        from trainer.reports.evaluate_runs import evaluate

        evaluate([self.run], self.request, self.extractor, self.command, self.weights)


def evaluate_by_jobs(jobs: Sequence[EvaluationJob], cluster: ClusterConfig) -> None:
    """Submits the jobs and waits for them; Ctrl-C cancels them. Raises WorkFailed if a job fails, after the others have
    ended."""
    handles = submit_independent(cluster, "evaluate", list(jobs))
    with progress_bar(total=len(handles), desc="evaluate", unit="run") as bar:

        def look(ended: int) -> bool:
            bar.update(ended - bar.n)
            return True

        wait(handles, cluster, look)
    failed = [(job.run, *failure_of(handle)) for job, handle in zip(jobs, handles, strict=True) if handle.exception()]
    if failed:
        reasons = "; ".join(f"{run}: {reason} ({log})" for run, reason, log in failed)
        raise WorkFailed(f"{len(failed)} of {len(jobs)} evaluations failed: {reasons}")


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check(args)
    from trainer.reports.evaluate_runs import subjects

    request, weights = request_of(args), weights_of(args)
    command = f"python -m slurm.evaluate {shlex.join(sys.argv[1:] if argv is None else argv)}"
    cluster = read_cluster(args.cluster)
    # Finds mistakes before the jobs wait in the queue. Warnings are dropped here, since the jobs print them.
    subjects(args.runs, request, weights, lambda text: None)
    jobs = [EvaluationJob(run.resolve(), request, args.extractor, command, weights) for run in args.runs]
    evaluate_by_jobs(jobs, cluster)
    return report_on(args, request, weights, command)


if __name__ == "__main__":
    sys.exit(errors.run(main))
