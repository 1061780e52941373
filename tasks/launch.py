"""A training stage by several processes: a launcher of the user's starts them, the first keeps the books."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rlhf.errors import UserError
from tasks.paths import Paths

LAUNCHER = "ALIGNFLOW_LAUNCHER"
"""The variable that holds the launcher, such as `torchrun --standalone --nproc-per-node 2`."""
LAST_WORDS = "ALIGNFLOW_LAST_WORDS"
"""The variable that names the file in which a process that fails leaves its sentence."""
LAUNCHED = ("sft", "reward", "policy")
"""The stages that several processes can share."""


def is_to_launch(stage: str) -> bool:
    """Whether the user named a launcher, the stage knows what to do with it, and it has not started us already."""
    return stage in LAUNCHED and bool(os.environ.get(LAUNCHER)) and "RANK" not in os.environ


def launch(arguments: list[str]) -> int:
    """Run `python -m tasks` with these arguments under the launcher; returns 0 or 1.

    What the launcher says about a failure is long; the sentence of the process that failed comes last.
    Raises UserError where there is no such launcher.
    """
    command = [*shlex.split(os.environ[LAUNCHER]), "-m", "tasks", *arguments]
    # The launchers of this environment, though it may not be active.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryDirectory() as folder:
        words = Path(folder) / "last-words"
        status = _run(command, {**environment, LAST_WORDS: str(words)})
        if status and words.exists():
            print(words.read_text(encoding="utf-8"), file=sys.stderr)
    return 1 if status else 0


def _run(command: list[str], environment: dict[str, str]) -> int:
    """The exit status of the launcher. Where we are told to stop, so is it, also when it has hardly begun."""
    told: list[int] = []
    handler = signal.signal(signal.SIGTERM, lambda number, _frame: told.append(number))
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as error:
        signal.signal(signal.SIGTERM, handler)
        raise UserError(
            f"{LAUNCHER} is {os.environ[LAUNCHER]!r}, which cannot be run ({error.strerror}); name a launcher such as "
            "'torchrun --standalone --nproc-per-node 2', or unset it"
        ) from error
    try:
        signal.signal(signal.SIGTERM, handler)
        if told:
            raise SystemExit(128 + signal.SIGTERM)
        return process.wait()
    finally:
        process.terminate()
        process.wait()


def leave_last_words(sentence: str) -> None:
    """Leave the sentence of a failure for the process that called the launcher; the first one stays."""
    if LAST_WORDS not in os.environ:
        return
    try:
        with Path(os.environ[LAST_WORDS]).open("x", encoding="utf-8") as file:
            file.write(sentence)
    except FileExistsError:
        pass


def is_follower() -> bool:
    """Whether another process of this training keeps the books."""
    return os.environ.get("RANK", "0") != "0"


@dataclass(frozen=True)
class FollowerPaths(Paths):
    """The workspace for a process that does not keep the books: its stage's reports and figures go to `scratch`.

    A model it reads where the main process wrote it (rlhf.models.save_model).
    """

    stage: str
    scratch: Path

    def report(self, stage: str, name: str | None = None) -> Path:
        return self._place(stage, super().report(stage, name))

    def metrics(self, stage: str, name: str | None = None) -> Path:
        return self._place(stage, super().metrics(stage, name))

    def checkpoints(self, stage: str, name: str) -> Path:
        return self._place(stage, super().checkpoints(stage, name))

    def _place(self, stage: str, path: Path) -> Path:
        return self.scratch / path.relative_to(self.root) if stage == self.stage else path
