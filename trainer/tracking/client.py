"""All calls of MLflow's client. Each can be repeated if it is not known whether it succeeded."""

from __future__ import annotations

import fcntl
import getpass
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ambient_core.errors import WorkFailed, one_line
from trainer.tracking import pages
from trainer.tracking.config import LoggingConfig

QUESTION = """import os, sys
os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_HTTP_REQUEST_MAX_RETRIES="1")
os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "10"
from mlflow.tracking import MlflowClient
print(len(MlflowClient(tracking_uri=sys.argv[1]).search_experiments(max_results=100)))
"""
"""A program that asks the server at the address in its argument for its experiments, and prints how many there are, up
to 100."""

KEY = "ambient.key"
"""A tag with the key that a run has before MLflow gives it an id."""


def begin(client: Any, experiment_id: str, key: str, name: str, began: int) -> str:
    """Returns the id of the run with this key, which is made if it does not exist. began: in milliseconds since 1970.

    A response may be lost, also between two attempts inside the client, which then makes a second run. All runs but one
    are deleted."""
    query = ([experiment_id], f"tags.`{KEY}` = '{key}'")
    if not (runs := client.search_runs(*query)):
        client.create_run(experiment_id, began, _origin("trainer.train") | {KEY: key}, name)
        runs = client.search_runs(*query)
    first, *others = sorted(run.info.run_id for run in runs)
    for run_id in others:
        client.delete_run(run_id)
    return first


def describe(client: Any, run_id: str, parameters: dict[str, Any], config: Path) -> None:
    from mlflow.entities import Param

    client.log_batch(run_id, params=[Param(name, str(value)[:6000]) for name, value in parameters.items()])
    client.log_artifact(run_id, str(config))


def tag(client: Any, run_id: str, tags: dict[str, str], files: Sequence[Path]) -> None:
    """Sets what may differ at each start: tags, and files that belong to it."""
    from mlflow.entities import RunTag

    for file in files:
        client.log_artifact(run_id, str(file))
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def send(client: Any, run_id: str, records: Sequence[dict[str, Any]], run_dir: Path) -> None:
    """Sends records of metrics.jsonl. They may be sent twice: MLflow keeps one of several identical metrics, and a
    picture that it already has is not sent again."""
    from mlflow.entities import Metric
    from PIL import Image

    batch = [Metric(name, value, r["time"], r["step"]) for r in records for name, value in r.get("metrics", {}).items()]
    for start in range(0, len(batch), 1000):
        client.log_batch(run_id, metrics=batch[start : start + 1000])
    pictures = any("image" in record for record in records)
    there = [item.path for item in client.list_artifacts(run_id, "images")] if pictures else []
    for record in records:
        if "image" in record:
            (name, path), step = record["image"], record["step"]
            if not any(other.startswith(f"images/{name}+step+{step}+") and other.endswith(".webp") for other in there):
                client.log_image(run_id, Image.open(run_dir / path), key=name, step=step)
        if "notice" in record:
            name, text = record["notice"]
            client.set_tag(run_id, f"notice.{name}", text)


def attach(
    config: LoggingConfig, run_dir: Path, step: int, metrics: dict[str, float], tags: dict[str, str], folder: Path
) -> bool:
    """Adds metrics and the files of a folder to the MLflow run of a run directory, and a view of such metrics to its
    experiment. Returns False if there is no run. Raises WorkFailed if the server does not accept them."""
    from mlflow.entities import Metric, RunTag
    from mlflow.exceptions import MlflowException

    try:
        if not pages.logged(run_dir):
            return False
        run_id = pages.state(run_dir)["run_id"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise WorkFailed(f"{run_dir / 'mlflow.json'}: is damaged ({error}): repair it or move it away") from None
    now = int(time.time() * 1000)
    try:
        client, experiment_id = connect(config, run_dir)
        client.log_batch(
            run_id,
            metrics=[Metric(name, value, now, step) for name, value in metrics.items()],
            tags=[RunTag(name, value[:5000]) for name, value in tags.items()],
        )
        client.log_artifacts(run_id, str(folder), f"evaluation/{folder.name}")
        client.set_experiment_tag(experiment_id, *pages.view())
    except (MlflowException, OSError) as error:
        raise WorkFailed(f"MLflow at {config.uri(run_dir)}: {one_line(error, 300)}") from None
    return True


def heading(config: LoggingConfig, run_dir: Path, tags: dict[str, str], source: str) -> str:
    """Makes a parent run without a training of its own, and returns its id. run_dir: its folder, which contains the
    children's folders. source: the command that requests it."""
    client, experiment_id = connect(config, run_dir / "child")
    run = client.create_run(experiment_id, run_name=config.name or run_dir.name, tags=_origin(source) | tags)
    client.set_terminated(run.info.run_id, "FINISHED")
    return run.info.run_id


def _origin(source: str) -> dict[str, str]:
    """Returns the tags that MLflow's pages show as "Created by" and "Source"; its client leaves both empty."""
    tags = {"mlflow.source.name": source, "mlflow.source.type": "LOCAL"}
    with suppress(OSError, KeyError):  # a container may have no name for its user
        tags["mlflow.user"] = getpass.getuser()
    return tags


def connect(config: LoggingConfig, run_dir: Path) -> tuple[Any, str]:
    """Returns MLflow's client and the id of the experiment, which is made if it does not exist."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with _alone(config.uri(run_dir)):
        client = MlflowClient(tracking_uri=config.uri(run_dir))
        if experiment := client.get_experiment_by_name(config.experiment):
            return client, experiment.experiment_id
        artifacts = None if config.tracking_uri else (run_dir.resolve().parent / "mlartifacts").as_uri()
        return client, client.create_experiment(config.experiment, artifacts)


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Lets one process at a time make a database file: two at the same time leave it incomplete."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0] + ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
