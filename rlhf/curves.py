"""Training curves on their way out: to whoever listens, and to a CSV file that `dvc plots` draws."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Log = Callable[[Mapping[str, float], int], None]
"""`log(metrics, step)`: what a training function calls as it goes."""


def no_log(_metrics: Mapping[str, float], _step: int) -> None:
    """Listen to nothing."""


TELLING = (
    "loss",
    "held_out_loss",
    "held_out_accuracy",
    "rewards/accuracies",
    "reward",
    "objective/scores",
    "objective/kl",
    "kl",
    "completions/mean_length",
)
"""The figures by which one sees from afar how a training goes."""


class Spoken:
    """A Log that passes everything on, and says the telling figures at most once in so many seconds."""

    def __init__(self, log: Log, seconds: float = 15.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._seconds = seconds
        self._clock = clock
        self._next = -math.inf

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        self._log(metrics, step)
        told = [f"{name} {metrics[name]:.4g}" for name in TELLING if name in metrics]
        if told and self._clock() >= self._next:
            self._next = self._clock() + self._seconds
            logger.info("step %d: %s", step, ", ".join(told))


class CurveRecorder:
    """A Log that passes everything on and remembers it, one row per step."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.rows: dict[int, dict[str, float]] = {}

    def __call__(self, metrics: Mapping[str, float], step: int) -> None:
        self.rows.setdefault(step, {}).update(metrics)
        self._log(metrics, step)

    def state(self) -> dict[int, dict[str, float]]:
        return self.rows

    def restore(self, state: dict[int, dict[str, float]]) -> None:
        """Take in the rows of a training that was stopped; the listener hears them again."""
        for step, metrics in state.items():
            self(metrics, step)

    def write(self, path: Path) -> None:
        """Write `step` and every metric seen as the columns of a CSV file, gaps empty."""
        names = sorted({name for row in self.rows.values() for name in row})
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["step", *names], lineterminator="\n")
            writer.writeheader()
            for step in sorted(self.rows):
                rounded = {name: rounded_number(value) for name, value in self.rows[step].items()}
                writer.writerow({"step": step, **rounded})


def rounded_number(value: Any) -> Any:
    """Floats at six significant digits, so that files stay readable and comparable; not-a-number becomes None."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded_number(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded_number(inner) for inner in value]
    return value


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all: sorted keys, rounded numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(
        json.dumps(rounded_number(content), indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    os.replace(partial, path)
