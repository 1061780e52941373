"""What a flow run leaves for people: progress and artifacts in Prefect, a table in the terminal."""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed, State

from tasks.paths import Paths
from tasks.stage import SKIPPED, UNCHANGED, Workspace

COLUMNS = {
    "gold_reward": "gold reward",
    "win_rate": "win rate against sft",
    "proxy_reward": "proxy reward",
    "kl_to_sft": "KL to sft (nats)",
    "mean_tokens": "tokens",
    "stop_rate": "stop rate",
}
_WIDTH = 110
"""Of the table in the terminal; narrower ones, and pipes, get it all the same."""
REPORT = "reports/evaluate/report.html"


def count_progress(workspace: Workspace, stages: int) -> None:
    """Show in Prefect's UI how many of the flow's stages are done, and say what DVC found to do."""
    get_run_logger().info("stale by DVC's word: %s", ", ".join(sorted(workspace.stale)) or "nothing")
    artifact = create_progress_artifact(0.0, key="alignment-progress", description=f"Stages done, of {stages}")
    assert isinstance(artifact, UUID)  # in a flow that is not async
    done, lock = itertools.count(1), threading.Lock()

    def advance() -> None:
        with lock, _courtesy("the run's progress"):
            update_progress_artifact(artifact, progress=100.0 * next(done) / stages)

    workspace.on_end = advance


def publish(workspace: Workspace, states: dict[str, State[Any]], seconds: float) -> None:
    """Leave the table of policies and a page with stages, durations and links as artifacts of the flow run."""
    rows = read_rows(workspace.paths) if states["evaluate"].is_completed() else []
    page = _page(workspace, states, rows, seconds)
    with _courtesy("the table of results"):
        if rows:
            text = "Policies on the same held-out prompts"
            create_table_artifact(table=rows, key="alignment-policies", description=text)
        create_markdown_artifact(page, key="alignment-results", description="Results")


@contextmanager
def _courtesy(what: str) -> Iterator[None]:
    """Where Prefect's server is away, a training must not fail for what is only shown there."""
    try:
        yield
    except httpx.HTTPError as error:
        get_run_logger().warning("Prefect's server did not take %s (%s); the run goes on", what, error)


def read_rows(paths: Paths) -> list[dict[str, Any]]:
    """One row per policy from metrics/evaluate.json, the best by gold reward first."""
    path = paths.metrics("evaluate")
    figures = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    policies = {
        name: values for name, values in figures.items() if isinstance(values, dict) and "gold_reward" in values
    }
    ordered = sorted(policies.items(), key=lambda item: -item[1]["gold_reward"])
    return [
        {"policy": name} | {title: _cell(key, values) for key, title in COLUMNS.items()} for name, values in ordered
    ]


def _cell(key: str, values: dict[str, Any]) -> str:
    value = values.get(key)
    if not isinstance(value, (int, float)):
        return "–"
    low, high = values.get(f"{key}_low"), values.get(f"{key}_high")
    interval = f" ({low:.3f}–{high:.3f})" if isinstance(low, float) and isinstance(high, float) else ""
    return f"{value:.3f}{interval}"


def _page(workspace: Workspace, states: dict[str, State[Any]], rows: list[dict[str, Any]], seconds: float) -> str:
    stages = [
        {
            "stage": name,
            "state": state.name or state.type.value,
            "seconds": f"{end - begin:.1f}"
            if (span := workspace.spans.get(name)) and (begin := span[0]) and (end := span[1])
            else "",
            "": state.message or "",
        }
        for name, state in states.items()
    ]
    inside = _covered(workspace.spans.values())
    share = f", {100 * (1 - inside / seconds):.0f} % of it outside the stages" if inside else ""
    parts = ["## Stages", _markdown(stages), f"The flow took {seconds:.0f} s{share}."]
    if rows:
        parts += ["## Policies", _markdown(rows)]
    if problems := _read_problems(workspace.paths, states):
        parts += ["## Health", _markdown(problems)]
    if workspace.decisions:
        parts += ["## Promotion", *(f"- {decision}" for decision in workspace.decisions)]
    links = (
        f"`{REPORT}` (answers side by side), `make ui` (MLflow: runs and models), `dvc metrics show`, `dvc plots show`"
    )
    return "\n\n".join([*parts, "## Where to look", links])


def _read_problems(paths: Paths, states: dict[str, State[Any]]) -> list[dict[str, str]]:
    """One row per health rule that warns of a complete training or would stop it, the worst first."""
    rows: list[dict[str, str]] = []
    for stage in (name for name, state in states.items() if state.is_completed()):
        path = paths.report(*stage.split("@")) / "health.json"
        findings = json.loads(path.read_text(encoding="utf-8"))["findings"] if path.exists() else []
        rows += [
            {"training": stage, "verdict": found["verdict"], "rule": found["rule"], "figure": found["finding"]}
            | {"what it means": found["meaning"], "what to do": found["remedy"]}
            for found in findings
            if found["verdict"] != "ok"
        ]
    return sorted(rows, key=lambda row: row["verdict"] != "stop")


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """The seconds in which at least one stage was at work."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    return "\n".join(
        lines + ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row.values()) + " |" for row in rows]
    )


def conclude(states: dict[str, State[Any]]) -> State[Any]:
    """The flow's own state: complete, or what failed, what is complete nevertheless and what did not run."""
    failed = {name: state for name, state in states.items() if not (state.is_completed() or state.name == SKIPPED)}
    if not failed:
        unchanged = [name for name, state in states.items() if state.name == UNCHANGED]
        return Completed(message=f"{len(unchanged)} of {len(states)} stages were up to date")
    complete = [name for name, state in states.items() if state.is_completed()]
    waiting = [name for name, state in states.items() if state.name == SKIPPED]
    sentences = [f"{name} failed: {state.message}" for name, state in failed.items()]
    if complete:
        sentences.append(f"complete: {', '.join(complete)}")
    if waiting:
        sentences.append(f"not run, as they need {' and '.join(failed)}: {', '.join(waiting)}")
    return Failed(message="; ".join(sentences))


def show(paths: Paths, state: State[Any]) -> None:
    """Print the policies and the addresses to look at, or why the flow failed."""
    from rich.console import Console
    from rich.table import Table

    if not state.is_completed():
        print(state.message, file=sys.stderr)
        return
    rows = read_rows(paths)
    if rows:
        table = Table(title="Policies on the same held-out prompts")
        for index, column in enumerate(rows[0]):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row.values())
        Console(width=max(Console().width, _WIDTH)).print(table)
    print(f"answers side by side  {REPORT}")
    print("runs and models       make ui: MLflow on http://127.0.0.1:5000, Prefect on http://127.0.0.1:4200")
    print("figures and curves    dvc metrics show, dvc plots show")
