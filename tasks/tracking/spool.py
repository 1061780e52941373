"""The spool: one append-only journal per run, what of it MLflow has taken, and the locks around both."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"
PROGRESS = "progress.json"
WRITER = "writer.lock"
SHIPPER = "shipper.lock"


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock on a file; yields whether it was had (always, where we wait)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


class Journal:
    """The events of one run in order, each a line of JSON with `kind` and `time` (milliseconds).

    No two events have one time: of two values of a metric at one step and time MLflow takes the larger for the latest.
    Writing needs no server and no MLflow. A writer holds a lock, so that others can tell a run that
    goes on from one whose process died.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._mutex = threading.Lock()
        self._time = 0
        self._writer = (folder / WRITER).open("ab")
        fcntl.flock(self._writer, fcntl.LOCK_EX)
        self._events = (folder / EVENTS).open("ab", buffering=0)

    def write(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Append one event. Raises OSError where the disk takes no more."""
        with self._mutex:
            self._time = max(int(time.time() * 1000), self._time + 1)
            line = json.dumps({"kind": kind, "time": self._time, **fields}) + "\n"
            self._events.write(line.encode())

    def close(self) -> None:
        with self._mutex:
            self._events.close()
            self._writer.close()


@dataclass
class Progress:
    """How far a journal has been sent: bytes of it, and the run it went to."""

    offset: int = 0
    uri: str | None = None
    run_id: str | None = None
    parent_id: str | None = None
    error: str | None = None
    warned: bool = False
    """Whether an event has been given up; the journal's log says which."""


def load_progress(folder: Path) -> Progress:
    try:
        return Progress(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Progress()


def save_progress(folder: Path, progress: Progress) -> None:
    partial = folder / f"{PROGRESS}.partial"
    partial.write_text(json.dumps(asdict(progress)), encoding="utf-8")
    os.replace(partial, folder / PROGRESS)


def read_events(folder: Path, offset: int) -> list[tuple[dict[str, Any], int]]:
    """The whole events from a byte on, each with the offset behind it; a torn last line is left for later."""
    with (folder / EVENTS).open("rb") as file:
        file.seek(offset)
        lines = file.read().splitlines(keepends=True)
    events: list[tuple[dict[str, Any], int]] = []
    for line in lines:
        if not line.endswith(b"\n"):
            break
        offset += len(line)
        try:
            events.append((json.loads(line), offset))
        except json.JSONDecodeError:
            # A line torn by a full disk, followed by others: nothing of it can be known.
            events.append(({"kind": "torn", "time": 0}, offset))
    return events


def is_abandoned(folder: Path) -> bool:
    """Whether the journal's writer is gone."""
    with locked(folder / WRITER, wait=False) as free:
        return free


def end_abandoned(folder: Path) -> None:
    """Give a journal whose writer died without a word its end, so that its run does not go on for ever."""
    events = read_events(folder, 0)
    if any(event["kind"] == "end" for event, _ in events):
        return
    last = max((event["time"] for event, _ in events), default=int(time.time() * 1000))
    end = {"kind": "end", "time": last, "status": "KILLED", "error": "the process disappeared without a word"}
    with (folder / EVENTS).open("ab") as file:
        # The newline first closes a line torn by the death.
        file.write(b"\n" + json.dumps(end).encode() + b"\n")


def journals(spool: Path) -> list[Path]:
    """The journals that wait, oldest first."""
    return sorted(path.parent for path in spool.glob(f"*/{EVENTS}"))
