"""How right a reward model and its suspicions are: the only reader of truth columns in the reward stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from rlhf.data.formats import Row, completion_text, read_rows

FLIPPED = "truth_flipped"
"""The column that says whether `chosen` and `rejected` stand the wrong way round."""
TRUE_SCORE = "truth_score"
"""The column with a rating's true value."""


def read_flips(path: Path) -> dict[str, bool] | None:
    """Which rows of a preference file are labelled wrongly, by id; None where the truth is not known of every row."""
    rows = read_rows(path)
    if not rows or any(FLIPPED not in row for row in rows):
        return None
    return {row["id"]: bool(row[FLIPPED]) for row in rows}


def read_rating_flips(path: Path, label: Callable[[np.ndarray], np.ndarray]) -> dict[str, bool] | None:
    """The same of a file of ratings, of which `label` makes labels: those that the true rating would change."""
    rows = read_rows(path)
    if not rows or any(TRUE_SCORE not in row for row in rows):
        return None
    given, true = (label(np.array([row[name] for row in rows], dtype=float)) for name in ("score", TRUE_SCORE))
    return {row["id"]: bool(wrong) for row, wrong in zip(rows, given != true, strict=True)}


def rank_suspects(margins: np.ndarray, right: np.ndarray | None) -> np.ndarray:
    """Positions of the pairs from the most to the least suspicious.

    By the probability that the label is right, where the objective had it estimated, else by the margin at the last
    visit in training: both find wrong labels better than the share of a label that the plans used
    (docs/methods/selectiverm.md). A pair that was never visited, whose margin is not a number, comes last.
    """
    return np.argsort(margins if right is None else right, kind="stable")


def grade_audit(suspects: np.ndarray, flips: Sequence[bool], noise_rate: float) -> dict[str, float | int | None]:
    """Precision and recall when the first `noise_rate` of the suspects are called wrong, given which of them are.

    `audit_auroc` is the chance that a wrong pair ranks before a right one. None where nothing can be counted.
    """
    wrong = np.asarray(flips, dtype=bool)[suspects]
    flagged = math.ceil(noise_rate * len(wrong))
    hits = int(wrong[:flagged].sum())
    pairs = int(wrong.sum()) * int((~wrong).sum())
    right_after = np.cumsum((~wrong)[::-1])[::-1]
    return {
        "audit_flagged": flagged,
        "audit_precision": hits / flagged if flagged else None,
        "audit_recall": hits / int(wrong.sum()) if wrong.any() else None,
        "audit_auroc": float(right_after[wrong].sum() / pairs) if pairs else None,
    }


def turn_wrong_margins(margins: np.ndarray, ids: Sequence[str], flips: Mapping[str, bool]) -> np.ndarray:
    """Margins (pairs,) of the truly better answer over the other."""
    return margins * np.where([flips[name] for name in ids], -1.0, 1.0)


def measure_length_baseline(train: Sequence[Row], test: Sequence[Row]) -> np.ndarray:
    """Margins (test pairs,) of a judge who only counts characters, and likes what the training labels like."""
    taste = np.sign(_length_margins(train).mean()) if train else 1.0
    return (taste or 1.0) * _length_margins(test)


def _length_margins(rows: Sequence[Row]) -> np.ndarray:
    lengths = [[len(completion_text(row[side])) for side in ("chosen", "rejected")] for row in rows]
    return np.array(lengths, dtype=float).reshape(-1, 2) @ np.array([1.0, -1.0])


def draw_margins(margins: np.ndarray, flips: Sequence[bool] | None, path: Path) -> None:
    """A histogram of held-out margins, wrong labels apart where they are known; the same margins give the same file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    wrong = np.zeros(len(margins), dtype=bool) if flips is None else np.asarray(flips, dtype=bool)
    edges = np.histogram_bin_edges(margins, bins=40).tolist()
    axes.hist([margins[~wrong], margins[wrong]], edges, stacked=True, label=["label", "label known to be wrong"])
    axes.axvline(0, color="black", linewidth=1)
    axes.set(xlabel="score in favour of the label (of a pair, chosen minus rejected)", ylabel="held-out labels")
    if flips is not None:
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
