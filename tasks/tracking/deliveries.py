"""What each kind of event becomes in MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tasks.paths import Paths
from tasks.tracking.lineage import Group, hash_path
from tasks.tracking.models import find_model, log_model
from tasks.tracking.spool import Progress, save_progress
from tasks.tracking.store import parent_run, settle_parent

if TYPE_CHECKING:
    from mlflow import MlflowClient

Event = dict[str, Any]
Item = TypeVar("Item")

_METRICS = 500
"""Metrics per request; MLflow takes at most 1000."""
_PARAMS = 100
"""Params and tags per request, MLflow's limit."""


@dataclass
class Delivery:
    """A journal on its way to one run."""

    client: MlflowClient
    experiment_id: str
    paths: Paths
    folder: Path
    progress: Progress

    @property
    def run_id(self) -> str:
        if self.progress.run_id is None:
            raise ValueError("the journal's start could not be sent, so there is no run")
        return self.progress.run_id


def _start(delivery: Delivery, events: list[Event]) -> None:
    """Make the run, under its parent; looked up first, since a death between making and noting is possible."""
    from mlflow.entities import Param

    event, client, progress = events[0], delivery.client, delivery.progress
    group = Group(**event["group"])
    progress.parent_id = parent_run(client, delivery.experiment_id, delivery.paths, group)
    journal = delivery.folder.name
    found = client.search_runs([delivery.experiment_id], f"tags.`alignflow.journal` = '{journal}'", max_results=1)
    tags = event["tags"] | {"mlflow.parentRunId": progress.parent_id, "alignflow.journal": journal}
    made = found[0] if found else client.create_run(delivery.experiment_id, event["time"], tags, event["name"])
    progress.run_id = made.info.run_id
    save_progress(delivery.folder, progress)
    client.update_run(progress.parent_id, status="RUNNING")
    for some in _chunks(event["params"].items(), _PARAMS):
        client.log_batch(progress.run_id, params=[Param(key, value[:6000]) for key, value in some])


def _parent_params(delivery: Delivery, events: list[Event]) -> None:
    """All values on the flow's row, so that rows can be compared by them."""
    from mlflow.entities import Param

    for some in _chunks(events[0]["values"].items(), _PARAMS):
        delivery.client.log_batch(
            str(delivery.progress.parent_id), params=[Param(key, value[:6000]) for key, value in some]
        )


def _parent_models(delivery: Delivery, events: list[Event]) -> None:
    """Name the logged models that a stage starts from as its inputs."""
    from mlflow.entities import LoggedModelInput

    found = [find_model(delivery.client, delivery.experiment_id, md5) for md5 in events[0]["md5s"]]
    models = [LoggedModelInput(model.model_id) for model in found if model is not None]
    if models:
        delivery.client.log_inputs(delivery.run_id, models=models)


def _metrics(delivery: Delivery, events: list[Event]) -> None:
    from mlflow.entities import Metric

    points = chain.from_iterable(
        (Metric(key, value, event["time"], event["step"]) for key, value in event["values"].items()) for event in events
    )
    for some in _chunks(points, _METRICS):
        delivery.client.log_batch(delivery.run_id, metrics=some)


def _parent_metrics(delivery: Delivery, events: list[Event]) -> None:
    """The figures a person compares, on the flow's row."""
    from mlflow.entities import Metric

    event = events[0]
    points = (Metric(key, value, event["time"], 0) for key, value in event["values"].items())
    for some in _chunks(points, _METRICS):
        delivery.client.log_batch(str(delivery.progress.parent_id), metrics=some)


def _tags(delivery: Delivery, events: list[Event]) -> None:
    from mlflow.entities import RunTag

    for some in _chunks(events[0]["values"].items(), _PARAMS):
        delivery.client.log_batch(delivery.run_id, tags=[RunTag(key, value[:8000]) for key, value in some])


def _dataset(delivery: Delivery, events: list[Event]) -> None:
    """A dataset by its digest; the rows themselves are never read."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    event = events[0]
    source, profile = json.dumps({"uri": event["name"]}), json.dumps({"bytes": event["bytes"]})
    dataset = Dataset(event["name"], event["digest"], "local", source, profile=profile)
    tag = InputTag("mlflow.data.context", event["context"])
    delivery.client.log_inputs(delivery.run_id, datasets=[DatasetInput(dataset, [tag])])


def _artifact(delivery: Delivery, events: list[Event]) -> None:
    event = events[0]
    path = _unchanged(delivery.paths.root / event["path"], event["md5"])
    delivery.client.log_artifact(delivery.run_id, str(path), event["to"])


def _table(delivery: Delivery, events: list[Event]) -> None:
    """A table that the UI lays beside those of other runs; MLflow appends, so one that is there is left."""
    event = events[0]
    if any(file.path == event["to"] for file in delivery.client.list_artifacts(delivery.run_id)):
        return
    rows = json.loads(_unchanged(delivery.paths.root / event["path"], event["md5"]).read_text(encoding="utf-8"))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    delivery.client.log_table(delivery.run_id, {name: [row.get(name) for row in rows] for name in columns}, event["to"])


def _model(delivery: Delivery, events: list[Event]) -> None:
    event = events[0]
    folder = _unchanged(delivery.paths.root / event["path"], event["md5"])
    log_model(delivery.client, delivery.run_id, folder, event["md5"], event["name"])


def _unchanged(path: Path, md5: str) -> Path:
    """The path, if it still holds what it held when the run wrote it; a later run may have come first."""
    if hash_path(path) != md5:
        raise ValueError(f"{path} has changed since the run wrote it")
    return path


def _end(delivery: Delivery, events: list[Event]) -> None:
    event = events[0]
    if event.get("error"):
        delivery.client.set_tag(delivery.run_id, "alignflow.error", event["error"])
    delivery.client.set_terminated(delivery.run_id, event["status"], event["time"])
    settle_parent(delivery.client, delivery.experiment_id, str(delivery.progress.parent_id))


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some


def _nothing(_delivery: Delivery, _events: list[Event]) -> None:
    """A line torn by a full disk."""


HANDLERS: dict[str, Callable[[Delivery, list[Event]], None]] = {
    "start": _start,
    "parent_params": _parent_params,
    "parent_models": _parent_models,
    "metrics": _metrics,
    "parent_metrics": _parent_metrics,
    "tags": _tags,
    "dataset": _dataset,
    "artifact": _artifact,
    "table": _table,
    "model": _model,
    "end": _end,
    "torn": _nothing,
}
