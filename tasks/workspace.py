"""The repository a flow works in: one flow at a time, its environment, and what DVC says about its stages."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.errors import UserError
from tasks.paths import Paths
from tasks.processes import start_keeper, stop_processes
from tasks.tracking.lineage import flow_environment

DVC = [sys.executable, "-m", "dvc", "--wait-for-lock"]


class BusyError(UserError):
    """Another flow is at work in the workspace."""


@dataclass
class Workspace:
    """What a flow knows of its stages while it runs."""

    paths: Paths
    max_hours: float = 72.0
    """A stage that takes longer is ended: a hung one must not hold a schedule for ever."""
    environment: dict[str, str] = field(default_factory=dict)
    stale: frozenset[str] = frozenset()
    """What DVC called stale when the flow began."""
    complete: set[str] = field(default_factory=set)
    unchanged: set[str] = field(default_factory=set)
    """Those of the complete stages that had nothing to do."""
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    """When the command of each stage that ran began and ended, in seconds of the monotonic clock."""
    decisions: list[str] = field(default_factory=list)
    """What promotion said."""
    on_end: Callable[[], None] = lambda: None
    """Called whenever a stage is done."""


_held: list[Path] = []


@contextmanager
def open_workspace(root: Path, max_hours: float = 72.0) -> Iterator[Workspace]:
    """Hold the workspace for one flow; every process of the flow ends with the block or with this process.

    Raises UserError where `root` is no workspace in a git repository, BusyError where another flow is at work in it.
    """
    check_workspace(root)
    workspace = Workspace(Paths(root), max_hours)
    with _lock(workspace.paths):
        start_keeper()
        try:
            yield workspace
        except BaseException:
            stop_processes()
            raise


@contextmanager
def _lock(paths: Paths) -> Iterator[None]:
    """One flow per workspace; the same process may enter again (the command line, then the flow it starts)."""
    if paths.root in _held:
        yield
        return
    paths.state.mkdir(exist_ok=True)
    with (paths.state / "flow.lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BusyError(
                f"another flow (process {file.read().strip() or 'unknown'}) is at work in {paths.root}; "
                "wait for its end, stop it, or use a second clone"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        _held.append(paths.root)
        try:
            yield
        finally:
            _held.remove(paths.root)


def check_workspace(root: Path) -> None:
    """Raise UserError unless `root` has a dvc.yaml and lies in a git repository."""
    if not (root / "dvc.yaml").exists():
        raise UserError(f"{root} has no dvc.yaml; run from the repository's root")
    if not any((folder / ".git").exists() for folder in (root, *root.parents)):
        raise UserError(
            f"{root} is in no git repository, which DVC needs; run `git init && git add . && git commit -m start`"
        )


def find_stale(workspace: Workspace) -> frozenset[str]:
    """The stages whose code, data, params or outputs differ from dvc.lock, by DVC's word.

    Those that are only downstream of such a stage are not among them. Raises UserError where DVC cannot
    make sense of the workspace.
    """
    answer = subprocess.run(
        [*DVC, "status", "--json"],
        cwd=workspace.paths.root,
        env=os.environ | workspace.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode:
        reason = " ".join(answer.stderr.removeprefix("ERROR: ").split())
        raise UserError(f"DVC cannot tell which stages are stale: {reason}")
    return frozenset(json.loads(answer.stdout))


def stage_environment(flow_run_id: str | None, flow_run_name: str | None) -> dict[str, str]:
    """What the flow's stages find in their environment: our Python, plain lines, and the flow they belong to."""
    own = str(Path(sys.executable).parent)
    environment = {
        "PATH": f"{own}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
        "DO_NOT_TRACK": "1",
    }
    if flow_run_id and flow_run_name:
        environment |= flow_environment(flow_run_id, flow_run_name)
    return environment
