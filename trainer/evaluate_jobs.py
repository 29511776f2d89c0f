"""Evaluates runs by jobs of a cluster, one for each run, as one array. What they find is read back afterwards."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slurm.cluster import POLL, ClusterConfig, Resumable, executor, failure_of, submit
from trainer.errors import WorkFailed
from trainer.progress import progress_bar

if TYPE_CHECKING:
    from trainer.evaluation.request import Request
    from trainer.evaluations import Weights


@dataclass(frozen=True)
class EvaluationJob(Resumable):
    """See `evaluate`. Started again, it goes on with the samples that are drawn."""

    run: Path
    request: Request
    extractor: str
    command: str
    weights: Weights

    def __call__(self) -> None:
        from trainer.evaluations import evaluate

        evaluate([self.run], self.request, self.extractor, self.command, self.weights)


def evaluate_by_jobs(jobs: Sequence[EvaluationJob], cluster: ClusterConfig) -> None:
    """Waits for them; Ctrl-C cancels them. Raises WorkFailed where one fails, after the others have ended."""
    folder = Path(cluster.logs).absolute() / f"evaluate-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    handles = submit(executor(cluster.on_one_node(), folder, "evaluate"), list(jobs))
    print(f"jobs {' '.join(handle.job_id for handle in handles)}; logs in {folder}", file=sys.stderr)
    try:
        with progress_bar(total=len(handles), desc="evaluate", unit="run") as bar:
            while bar.n < len(handles):
                time.sleep(POLL[cluster.kind])
                bar.update(sum(handle.done() for handle in handles) - bar.n)
    except BaseException:
        for handle in handles:
            handle.cancel(check=False)
        raise
    failed = [(job.run, *failure_of(handle)) for job, handle in zip(jobs, handles, strict=True) if handle.exception()]
    if failed:
        told = "; ".join(f"{run}: {reason} ({log})" for run, reason, log in failed)
        raise WorkFailed(f"{len(failed)} of {len(jobs)} evaluations failed: {told}")
