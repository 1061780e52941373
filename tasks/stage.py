"""The glue between Prefect and DVC: one task run per stage, in which DVC decides whether the stage has to run."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed, State
from prefect.tasks import Task

from tasks.processes import Process, StoppedError, run_process
from tasks.workspace import DVC, BusyError, Workspace, check_workspace, find_stale, open_workspace, stage_environment

__all__ = [
    "SKIPPED",
    "UNEXPECTED",
    "UNCHANGED",
    "BusyError",
    "Workspace",
    "check_workspace",
    "find_stale",
    "open_workspace",
    "promote_task",
    "stage_environment",
    "stage_task",
]

RETRIES = {"validate": 0}
"""Bad data stays bad; another stage that broke down, rather than refused, is tried once more."""
UNCHANGED, RESTORED, SKIPPED = "Unchanged", "Restored", "Skipped"
"""Names of states: nothing to do, taken from DVC's cache, not run as a stage before it is not complete."""
REFUSED, BROKEN = "Refused", "Broken"
"""Names of failures: with a reason that a second try cannot mend, and without."""
KILLED = (128 + signal.SIGKILL, 128 + signal.SIGTERM)
"""Exit statuses of a shell whose child was killed, and of a stage that ended in order when it was told to."""

UNEXPECTED = "run again with --debug for the traceback"
"""How a stage ends its sentence where it does not know what happened (tasks/__main__.py)."""
_FAILED = re.compile(r"ERROR: failed to reproduce '[^']*'(?:: failed to run: .*, exited with (-?\d+))?")
_SKIPPED = re.compile(r"Stage '[^']*' didn't change, skipping")
_RESTORED = re.compile(r"Stage '[^']*' is cached - skipping run")
_LOCK_FILE = re.compile(r"(Updating|Generating) lock file ")
_CHATTER = re.compile(
    r"\s*$|To track the changes with git|To enable auto staging|Use `dvc push`|Data and pipelines are up to date"
    r"|\s*git add |\s*dvc config core\.autostage|Running stage "
)
_LEVELLED = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b:? ?(.*)")


def stage_task(workspace: Workspace, name: str, after: list[str]) -> Task[[], State[Any]]:
    """The task of the stage `name`, whose upstream stages are `after`; the state of its run says what DVC decided."""

    def decide() -> State[Any]:
        if lacking := [other for other in after if other not in workspace.complete]:
            return _skipped(lacking)
        # A stage may read what one far before it has just changed, though the one before it did not.
        if name not in workspace.stale and workspace.unchanged == workspace.complete:
            return _complete(
                workspace, name, Completed(name=UNCHANGED, message="nothing it reads or writes has changed")
            )
        return _run(workspace, name, [*DVC, "repro", "--single-item", name], Listener())

    return _as_task(decide, name)


def promote_task(workspace: Workspace, after: str) -> Task[[], State[Any]]:
    """The task of the promotion, which is no stage: DVC cannot version a registry."""

    def decide() -> State[Any]:
        if after not in workspace.complete:
            return _skipped([after])
        listener = Listener()
        state = _run(workspace, "promote", [sys.executable, "-m", "tasks", "promote"], listener)
        workspace.decisions = [line for line in listener.lines if not _LEVELLED.match(line)]
        return state

    return _as_task(decide, "promote")


def _as_task(body: Callable[[], State[Any]], name: str) -> Task[[], State[Any]]:
    allowed = RETRIES.get(name, 1)
    return Task(
        body,
        name=name,
        task_run_name=name,
        cache_policy=NO_CACHE,  # DVC alone knows what is up to date
        persist_result=False,
        # One above what is allowed: where retries are used up Prefect adds a traceback to the stage's own sentence.
        retries=allowed + 1,
        retry_condition_fn=lambda _task, run, state: state.name == BROKEN and run.run_count <= allowed,
    )


def _run(workspace: Workspace, name: str, command: list[str], listener: Listener) -> State[Any]:
    """Run the command of a stage and turn its end into a state."""
    process = Process(command, workspace.paths.root, os.environ | workspace.environment, workspace.max_hours * 3600)
    try:
        status = run_process(process, listener)
    except StoppedError:
        return Cancelled(message="stopped with the flow")
    except TimeoutError:
        get_run_logger().error("ended after %g hours, the most a stage may take", workspace.max_hours)
        return Failed(name="TimedOut", message=f"took longer than {workspace.max_hours:g} hours and was ended")
    finally:
        if listener.began:
            workspace.spans[name] = (listener.began, listener.ended or time.monotonic())
    if status:
        return _failure(status, listener)
    if listener.skipped:
        return _complete(workspace, name, Completed(name=UNCHANGED, message="DVC finds it up to date"))
    if listener.restored:
        return _complete(workspace, name, Completed(name=RESTORED, message="DVC had the result in its cache"))
    return _complete(workspace, name, Completed(message=f"ran {listener.seconds:.0f} s"))


def _complete(workspace: Workspace, name: str, state: State[Any]) -> State[Any]:
    workspace.complete.add(name)
    if state.name == UNCHANGED:
        workspace.unchanged.add(name)
    workspace.on_end()
    return state


def _skipped(lacking: list[str]) -> State[Any]:
    sentence = f"not run, as it needs {', '.join(lacking)}"
    get_run_logger().warning("%s", sentence)
    return Failed(name=SKIPPED, message=sentence)  # not Cancelled, which would leave those behind it without a word


def _failure(status: int, listener: Listener) -> State[Any]:
    """The stage's last sentence; REFUSED where the stage or DVC knew why, so that a second try is in vain."""
    exited = listener.status if listener.status is not None else status
    sentence = listener.lines[-1] if listener.lines else f"exit status {exited} without a word"
    if exited < 0 or exited in KILLED:
        number = abs(exited) % 128
        words = f"; its last words: {sentence}" if listener.lines else ""
        sentence = f"killed by signal {number} (9: mostly a lack of memory, 15: somebody's `kill`){words}"
    elif UNEXPECTED not in sentence:
        get_run_logger().error("refused: %s", sentence)
        return Failed(name=REFUSED, message=sentence)
    get_run_logger().error("failed: %s", sentence)
    return Failed(name=BROKEN, message=sentence)


class Listener:
    """Passes on what a stage prints, and keeps apart what DVC says about itself."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.skipped = self.restored = False
        self.status: int | None = None
        """The exit status of the stage, which DVC's own hides."""
        self.began = self.ended = 0.0
        """When the stage's command began and ended; 0 where DVC did not run it."""
        self._made = time.monotonic()
        self._log = get_run_logger()

    @property
    def seconds(self) -> float:
        return (self.ended or time.monotonic()) - (self.began or self._made)

    def __call__(self, line: str) -> None:
        """Take a line."""
        if failed := _FAILED.match(line):
            self.ended = time.monotonic()
            if failed[1]:
                self.status = int(failed[1])
            else:
                self.lines.append(line.removeprefix("ERROR: "))
        elif _LOCK_FILE.match(line):
            self.ended = time.monotonic()
        elif line.startswith("> ") and not self.began:
            self.began = time.monotonic()
        elif _SKIPPED.match(line):
            self.skipped = True
        elif _RESTORED.match(line):
            self.restored = True
        elif not _CHATTER.match(line):
            self.lines = [*self.lines[-199:], line.strip()]
            levelled = _LEVELLED.match(line)
            level = logging.getLevelNamesMapping()[levelled[1]] if levelled else logging.INFO
            self._log.log(level, "%s", levelled[2] if levelled else line)
