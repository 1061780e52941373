"""Child processes that never outlive the flow: each in a group of its own, all of them under a keeper."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "ALIGNFLOW_FLOW_PROCESS"
"""In the environment of everything that a flow's process starts: by it the keeper knows them."""
GRACE_SECONDS = 12.0
"""From SIGTERM to SIGKILL: a stage needs a few seconds to close its MLflow run."""
_POLL_SECONDS = 0.2
_LINE_END = re.compile(r"[\r\n]+")

_groups: set[int] = set()
_stopping = threading.Event()
_keeper: subprocess.Popen[bytes] | None = None


class StoppedError(Exception):
    """The flow is ending; no process is started any more and those that run are told to stop."""


@dataclass(frozen=True)
class Process:
    """What is to be run, where, with which environment and for how many seconds at most."""

    command: list[str]
    folder: Path
    environment: dict[str, str]
    seconds: float


def run_process(process: Process, on_line: Callable[[str], None]) -> int:
    """Run a command in its own process group, hand over each line it prints, return its exit status.

    Raises TimeoutError where it takes too long and StoppedError where the flow is ending; these and
    whatever else interrupts us end the whole group first.
    """
    if _stopping.is_set():
        raise StoppedError
    child = subprocess.Popen(
        process.command,
        cwd=process.folder,
        env=process.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    _groups.add(child.pid)
    try:
        for line in _lines_of(child, time.monotonic() + process.seconds):
            on_line(line)
        status = child.wait()
    except BaseException:
        _end_group(child)
        raise
    finally:
        _groups.discard(child.pid)
    if _stopping.is_set():
        raise StoppedError
    return status


def _lines_of(process: subprocess.Popen[bytes], deadline: float) -> Iterator[str]:
    """What the process prints, line by line.

    Where it has ended but something it started still holds its output, what has come by then is all.
    """
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(process, lines), daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            if process.poll() is not None:
                return
            line = ""
        if line is None:
            return
        if time.monotonic() > deadline:
            raise TimeoutError
        if line:
            yield line


def _read_lines(process: subprocess.Popen[bytes], lines: queue.SimpleQueue[str | None]) -> None:
    """Cut at line feeds and at the carriage returns of progress bars."""
    if process.stdout is None:
        return
    rest = ""
    with process.stdout as stream:
        while chunk := os.read(stream.fileno(), 65536):
            *whole, rest = _LINE_END.split(rest + chunk.decode("utf-8", errors="replace"))
            for line in whole:
                lines.put(line)
    if rest:
        lines.put(rest)
    lines.put(None)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the group, SIGKILL to what is left after the grace; a second Ctrl-C shortens the grace."""
    try:
        _signal_group(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and _group_lives(process):
            time.sleep(_POLL_SECONDS)
    finally:
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reaps the leader, which would else count as a member
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _signal_group(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def stop_processes() -> None:
    """Tell every running group to end and start no other; those who wait for them raise StoppedError."""
    _stopping.set()
    for group in list(_groups):
        _signal_group(group, signal.SIGTERM)
    threading.Thread(target=_kill_late, args=(set(_groups),), daemon=True).start()


def _kill_late(groups: set[int]) -> None:
    time.sleep(GRACE_SECONDS)
    for group in groups & _groups:
        _signal_group(group, signal.SIGKILL)


def start_keeper() -> None:
    """Mark this process, and start the keeper that ends what carries the mark once this process is gone.

    However the flow ends, `kill -9` included, neither a stage nor Prefect's temporary server stays.
    """
    global _keeper
    _stopping.clear()
    if _keeper is not None and _keeper.poll() is None:
        return
    os.environ[MARK] = uuid.uuid4().hex
    _keeper = subprocess.Popen(
        [sys.executable, "-m", "tasks.processes", os.environ[MARK]],
        cwd=Path(__file__).resolve().parents[1],
        stdin=subprocess.PIPE,  # held open until our end, which the keeper sees as the end of its input
        start_new_session=True,  # Ctrl-C is not for the keeper
    )


def keep(token: str) -> None:
    """Wait for the end of the process that started us, then end whatever carries its mark."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    import psutil

    for number in (signal.SIGTERM, signal.SIGKILL):
        orphans = [process for process in psutil.process_iter() if _carries(process, token)]
        for process in orphans:
            with suppress(psutil.Error):
                process.send_signal(number)
        psutil.wait_procs(orphans, timeout=GRACE_SECONDS)


def _carries(process: object, token: str) -> bool:
    import psutil

    try:
        return (
            isinstance(process, psutil.Process) and process.environ().get(MARK) == token and process.pid != os.getpid()
        )
    except (psutil.Error, OSError):
        return False  # not ours to see, so not ours


if __name__ == "__main__":
    keep(sys.argv[1])
