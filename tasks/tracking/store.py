"""The MLflow store: its address, its first use, the experiment, and the parent runs that group stages."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.paths import EXPERIMENT, Paths
from tasks.tracking.lineage import Group
from tasks.tracking.spool import locked

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SQLITE = "sqlite:///"


def tracking_uri(paths: Paths) -> str:
    """MLFLOW_TRACKING_URI where it is set, else the workspace's own store; SQLite paths made absolute."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{paths.mlruns.resolve() / 'mlflow.db'}"
    if uri.startswith(_SQLITE):
        return _SQLITE + str(Path(uri.removeprefix(_SQLITE)).absolute())
    return uri


def ensure_store(paths: Paths) -> None:
    """Create the store and its experiment once; simultaneous first users wait for each other.

    Raises what MLflow raises where the server does not answer.
    """
    connect(tracking_uri(paths), paths)


def quieten_mlflow() -> None:
    """Bound MLflow's patience, and keep its network habits and its chatter out of a run."""
    defaults = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "HF_HUB_OFFLINE": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)


@functools.lru_cache(maxsize=8)
def connect(uri: str, paths: Paths) -> tuple[MlflowClient, str]:
    """A client of the store and the id of our experiment, both made where they are missing."""
    quieten_mlflow()
    import mlflow

    quieten_mlflow()  # importing resets the levels
    mlflow.set_tracking_uri(uri)
    # A first use migrates the database, and two at once break each other.
    with locked(paths.state / "store.lock", wait=True):
        if uri.startswith(_SQLITE):
            Path(uri.removeprefix(_SQLITE)).parent.mkdir(parents=True, exist_ok=True)
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is not None:
            return client, experiment.experiment_id
        return client, client.create_experiment(EXPERIMENT, artifact_location=_artifact_location(uri))


def _artifact_location(uri: str) -> str | None:
    """Beside a local database; a server decides for itself."""
    if uri.startswith(_SQLITE):
        return str(Path(uri.removeprefix(_SQLITE)).parent / "artifacts")
    return None


def parent_run(client: MlflowClient, experiment_id: str, paths: Paths, group: Group) -> str:
    """The id of the run that groups a flow's stages, made by whoever comes first."""
    with locked(paths.state / "parent.lock", wait=True):
        found = client.search_runs([experiment_id], f"tags.`alignflow.parent_key` = '{group.key}'", max_results=1)
        if found:
            return found[0].info.run_id
        tags = {"alignflow.parent_key": group.key, "alignflow.kind": "flow", "mlflow.source.name": "alignflow"}
        return client.create_run(experiment_id, run_name=group.name, tags=tags).info.run_id


def settle_parent(client: MlflowClient, experiment_id: str, parent_id: str) -> None:
    """Give a parent the status of its stages, of each the latest run: going on, failed, or finished."""
    children = client.search_runs(
        [experiment_id], f"tags.`mlflow.parentRunId` = '{parent_id}'", order_by=["attributes.start_time ASC"]
    )
    latest = {child.info.run_name: child.info.status for child in children}
    statuses = set(latest.values())
    if "RUNNING" in statuses:
        client.update_run(parent_id, status="RUNNING")
        return
    client.set_terminated(parent_id, "FAILED" if statuses - {"FINISHED"} else "FINISHED")
