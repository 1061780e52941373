"""Carries journals from the spool to MLflow, each event once, in whatever process and however late."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from rlhf.errors import UserError
from tasks.paths import Paths
from tasks.tracking.deliveries import HANDLERS, Delivery, Event
from tasks.tracking.spool import (
    EVENTS,
    SHIPPER,
    end_abandoned,
    is_abandoned,
    journals,
    load_progress,
    locked,
    read_events,
    save_progress,
)
from tasks.tracking.store import connect, tracking_uri

logger = logging.getLogger(__name__)

_GROUP = 500
"""Metric events sent together."""


def ship_journal(folder: Path, paths: Paths) -> bool:
    """Send what MLflow has not taken yet; True when the run's end has been sent and the journal is gone.

    A journal that another process is sending is left to it. Raises what MLflow raises where it does
    not answer; what was sent until then stays sent.
    """
    if not (folder / EVENTS).exists():
        return False  # another process has sent it
    with locked(folder / SHIPPER, wait=False) as ours:
        if not ours:
            return False
        progress = load_progress(folder)
        # A run that has begun on a server is finished there.
        uri = progress.uri or tracking_uri(paths)
        try:
            client, experiment_id = connect(uri, paths)
            progress.uri = uri
            ended = _send(Delivery(client, experiment_id, paths, folder, progress))
        except Exception as error:
            progress.error = describe(error)
            save_progress(folder, progress)
            raise
        if ended:
            shutil.rmtree(folder, ignore_errors=True)
        return ended


def ship_pending(paths: Paths) -> tuple[int, int]:
    """Send every journal whose process has ended; returns how many are gone and how many still wait.

    Raises what MLflow raises where it does not answer.
    """
    sent = waiting = 0
    for folder in journals(paths.state / "spool"):
        if not is_abandoned(folder):
            continue
        end_abandoned(folder)
        if ship_journal(folder, paths):
            sent += 1
        elif (folder / EVENTS).exists():
            waiting += 1
    return sent, waiting


def _send(delivery: Delivery) -> bool:
    """Deliver events in order and note each; an event MLflow will never take is given up, in the log."""
    ended = False
    for events, offset in _grouped(read_events(delivery.folder, delivery.progress.offset)):
        try:
            HANDLERS[events[0]["kind"]](delivery, events)
        except Exception as error:
            if not _is_lost(error):
                raise
            logger.warning("%s: %s given up: %s", delivery.folder.name, events[0]["kind"], describe(error))
            _mark_lost(delivery, events[0], error)
        delivery.progress.offset = offset
        delivery.progress.error = None
        save_progress(delivery.folder, delivery.progress)
        ended = events[-1]["kind"] == "end"
    return ended


def _grouped(events: list[tuple[Event, int]]) -> Iterator[tuple[list[Event], int]]:
    """Runs of metrics together, everything else one by one, each with the offset behind it."""
    waiting: list[Event] = []
    behind = 0
    for event, offset in events:
        if waiting and (event["kind"] != "metrics" or len(waiting) == _GROUP):
            yield waiting, behind
            waiting = []
        if event["kind"] == "metrics":
            waiting, behind = [*waiting, event], offset
        else:
            yield [event], offset
    if waiting:
        yield waiting, behind


def _is_lost(error: Exception) -> bool:
    """Whether sending again cannot help: the content was refused or is gone, not the server away."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, MlflowException):
        return error.error_code in {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST"}
    if isinstance(error, RequestException):
        return False
    return isinstance(error, (ValueError, TypeError, LookupError, AttributeError, ImportError, FileNotFoundError))


def _mark_lost(delivery: Delivery, event: Event, error: Exception) -> None:
    delivery.progress.warned = True
    if delivery.progress.run_id is None or event["kind"] in {"start", "end"}:
        return
    delivery.client.set_tag(delivery.progress.run_id, f"alignflow.lost.{event['kind']}", describe(error))


def describe(error: Exception) -> str:
    """The kind and the first line of a failure."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:500]


def sync(paths: Paths) -> str:
    """Send everything that waits and say so. Raises UserError where MLflow does not answer."""
    try:
        sent, waiting = ship_pending(paths)
    except Exception as error:
        raise UserError(
            f"MLflow at {tracking_uri(paths)} does not answer ({describe(error)}); "
            "start it, or set MLFLOW_TRACKING_URI, and sync again"
        ) from error
    return f"{sent} waiting records sent to {tracking_uri(paths)}, {waiting} still wait"
