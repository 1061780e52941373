"""The alignment pipeline: data, SFT, reward model, policies side by side, evaluation, promotion."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from typing import Any
from uuid import UUID

from prefect import allow_failure, flow
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import State
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.ownership import end_lost_runs
from flows.results import conclude, count_progress, publish, show
from flows.servers import check_api
from rlhf.errors import UserError
from rlhf.params_file import load_params
from tasks.paths import Paths, find_root
from tasks.stage import Workspace, find_stale, open_workspace, promote_task, stage_environment, stage_task


@flow(name="alignment", persist_result=False)
def align(parallel: int | None = None, max_hours: float = 72.0) -> State[Any]:
    """Bring every stage up to date, train up to `parallel` policies side by side, promote the best.

    `parallel` is by default 1 where there is a GPU, else the number of cores. A stage that takes longer
    than `max_hours` is ended. Where one fails, everything that does not depend on it is completed.
    """
    began = time.monotonic()
    with (
        ThreadPoolTaskRunner(parallel or _places()) as runner,
        open_workspace(find_root(), max_hours) as workspace,
    ):
        end_lost_runs(workspace.paths, UUID(flow_run.id))
        params = load_params(workspace.paths.params)
        workspace.environment = stage_environment(flow_run.id, flow_run.name)
        workspace.stale = find_stale(workspace)
        stages = Stages(workspace, runner)
        count_progress(workspace, len(params.policies) + 8)

        stages.start("prepare", after=[])
        stages.start("validate", after=["prepare"])
        stages.start("sft", after=["validate"])
        stages.start("embed", after=["sft"])
        stages.start("reward", after=["embed"])
        stages.start("probe", after=["reward"])
        policies = [stages.start(f"policy@{name}", after=["probe"]) for name in params.policies]
        stages.start("evaluate", after=policies)
        stages.start("promote", after=["evaluate"])

        states = stages.wait()
        publish(workspace, states, time.monotonic() - began)
    return conclude(states)


def _places() -> int:
    """How many policies train at a time: one on a GPU, which they would have to share."""
    return 1 if shutil.which("nvidia-smi") else os.cpu_count() or 1


class Stages:
    """The stages of one flow run: each starts as soon as those it comes after are done."""

    def __init__(self, workspace: Workspace, runner: TaskRunner[Any]) -> None:
        self._workspace, self._runner = workspace, runner
        self._futures: dict[str, PrefectFuture[Any]] = {}

    def start(self, name: str, after: list[str]) -> str:
        """Put a stage on its way, and return its name for those that come after it."""
        task = promote_task(self._workspace, *after) if name == "promote" else stage_task(self._workspace, name, after)
        upstream: list[Any] = [allow_failure(self._futures[other]) for other in after]
        self._futures[name] = self._runner.submit(task, parameters={}, wait_for=upstream)
        return name

    def wait(self) -> dict[str, State[Any]]:
        """The final state of every stage."""
        for future in self._futures.values():
            future.wait()
        return {name: future.state for name, future in self._futures.items()}


def main(arguments: list[str] | None = None) -> int:
    """Run the flow; the exit status is 0, 1 (explained on stderr), 130 (Ctrl-C) or 143 (SIGTERM)."""
    options = _parse(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        return run(options.parallel, options.max_hours)
    except UserError as error:
        if options.debug:
            traceback.print_exc()
        print(error, file=sys.stderr)
        return 1
    except (KeyboardInterrupt, TerminationSignal) as stop:
        print("stopped; the next run goes on with the stage that was at work", file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else 143


def run(parallel: int | None = None, max_hours: float = 72.0) -> int:
    """Run the flow in this workspace and show its result. Raises UserError before Prefect has begun."""
    paths = Paths(find_root())
    with open_workspace(paths.root):
        load_params(paths.params)
        check_api()
        logging.getLogger("httpx").setLevel(logging.WARNING)
        state = align(parallel, max_hours, return_state=True)
    show(paths, state)
    return 0 if state.is_completed() else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m flows.alignment", description=__doc__)
    parser.add_argument(
        "--parallel", type=_positive, help="policies trained at a time (default: 1 on a GPU, else cores)"
    )
    parser.add_argument("--max-hours", type=float, default=72.0, help="end a stage that takes longer (default: 72)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
