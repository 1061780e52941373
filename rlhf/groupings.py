"""Columns by which labels are wrong together: found by the labels alone, acted upon only by who names the column."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.data.formats import TRUTH, Row
from rlhf.trust import rates_by_other_groups

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

FEWEST_PAIRS = 20
"""A column's values need so many pairs in the mean."""
FEWEST_VALUES = 3
"""Of two values that contradict each other either may be the wrong one."""
MOST_COLUMNS = 8
"""At most so many columns are tried, those with the fewest values; each takes some seconds."""
SHOWN = 3
CUT = 60
_NO_GROUPS = ("id", "chosen", "rejected", "margin", "weight")


@dataclass(frozen=True)
class Grouping:
    """A column; `wrong` holds those of its `values` most of whose labels are wrong, and what share, the worst first."""

    column: str
    values: int
    wrong: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        named = [f"{name[:CUT]!r} {share:.2f}" for name, share in self.wrong[:SHOWN]]
        more = f" and {len(self.wrong) - SHOWN} more" if len(self.wrong) > SHOWN else ""
        return (
            f"{self.column}: of {len(self.wrong)} of its {self.values} values most labels contradict all other labels "
            f"({', '.join(named)}{more}); unless these are tastes of their own, judge by it: --group {self.column}"
        )


def find_groupings(
    rows: Sequence[Row], differences: np.ndarray, surface: np.ndarray, noise_rate: float, seed: int
) -> list[Grouping]:
    """The columns of preference rows with values most of whose labels are wrong, judged by models of the other values.

    Those that explain the most come first. `differences` and `surface` (pairs, …) are those of
    `rlhf.trust.trust_labels`.
    """
    columns = group_columns(rows)
    if len(columns) > MOST_COLUMNS:
        logger.info("too many columns to try all; not tried: %s", ", ".join(list(columns)[MOST_COLUMNS:]))
    found: dict[Grouping, float] = {}
    for column, groups in list(columns.items())[:MOST_COLUMNS]:
        rates, pairs = rates_by_other_groups(differences, noise_rate, seed, groups, surface), Counter(groups)
        wrong = tuple(sorted(((name, rate) for name, rate in rates.items() if rate > 0.5), key=lambda one: -one[1]))
        if wrong:
            found[Grouping(column, len(rates), wrong)] = sum(pairs[name] * _told(rate) for name, rate in wrong)
    return sorted(found, key=lambda grouping: -found[grouping])


def _told(rate: float) -> float:
    """Nats by which a label is better known than by a coin where the share `rate` of such labels is wrong."""
    return math.log(2) + rate * math.log(rate) + (1 - rate) * math.log1p(-rate)


def group_columns(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The columns that could be groups, those with the fewest values first: names, numbers or prompts that recur."""
    columns: dict[str, list[str]] = {}
    for name in rows[0]:
        if name in _NO_GROUPS or name.startswith(TRUTH):
            continue
        values = [row.get(name) for row in rows]
        if all(isinstance(value, str | int) or (name == "prompt" and value) for value in values):
            columns[name] = list(map(str, values))
    counts = {name: len(set(values)) for name, values in columns.items()}
    fit = [name for name, count in counts.items() if FEWEST_VALUES <= count <= len(rows) / FEWEST_PAIRS]
    return {name: columns[name] for name in sorted(fit, key=lambda name: counts[name])}
