"""Ratings as labels of single answers: from where on an answer is a good one, and how well scores tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from rlhf.data.formats import Row, completion_text
from rlhf.errors import UserError
from rlhf.params import RatingParams

BINS = 15
"""Of equal width, for the expected calibration error."""


@dataclass(frozen=True)
class Threshold:
    """A rating is good from `value` on, or above it where the value itself is not good."""

    value: float
    is_good: bool

    def label(self, scores: np.ndarray) -> np.ndarray:
        """1 for good and -1 for bad ratings, of the same shape."""
        good = scores >= self.value if self.is_good else scores > self.value
        return np.where(good, 1, -1)


def read_scores(section: RatingParams, rows: Sequence[Row]) -> np.ndarray:
    """(rows,) the ratings. Raises UserError, naming the row, for one that is off the scale."""
    for row in rows:
        if not section.low <= row["score"] <= section.high:
            raise UserError(
                f"row {row['id']}: score {row['score']:g} is off the scale {section.low:g} to {section.high:g}; "
                "mend it, or reward.ratings.low and high"
            )
    return np.array([row["score"] for row in rows], dtype=float)


def find_threshold(section: RatingParams, scores: np.ndarray) -> Threshold:
    """The threshold that `section.positive` names, for training ratings: `> median`, `>= mean` or `>= number`.

    Raises UserError where all ratings fall on one side.
    """
    if section.positive == "median":
        threshold = Threshold(float(np.median(scores)), is_good=False)
    else:
        value = float(scores.mean()) if section.positive == "mean" else float(section.positive)
        threshold = Threshold(value, is_good=True)
    good = int((threshold.label(scores) > 0).sum())
    if good in (0, len(scores)):
        raise UserError(
            f"all {len(scores)} training ratings are {'good' if good else 'bad'}, as good is "
            f"{'>=' if threshold.is_good else '>'} {threshold.value:g}; choose another reward.ratings.positive"
        )
    return threshold


def with_constant(embeddings: np.ndarray) -> np.ndarray:
    """(rows, dimensions + 1): embeddings about their mean, and a column of ones.

    Good and bad ratings differ in number, so what judges them needs an intercept, which pairs do not.
    """
    return np.hstack([embeddings - embeddings.mean(0), np.ones((len(embeddings), 1))])


def guess_by_length(train: Sequence[Row], labels: np.ndarray, test: Sequence[Row]) -> np.ndarray:
    """(test rows,) logits of a judge who only counts characters, from training rows with labels of 1 and -1."""
    known, unknown = (
        np.array([len(completion_text(row["completion"])) for row in rows], dtype=float) for rows in (train, test)
    )
    good, bad = known[labels > 0].mean(), known[labels < 0].mean()
    return np.sign(good - bad) * (unknown - (good + bad) / 2)


def measure_ratings(logits: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """How well scores (rows,) tell good from bad ratings (rows,), 1 or -1, and how far their probabilities are right.

    `mae`, `r2` and `ece` compare the probability of a good rating with the label; `margin` is the mean score in favour
    of the label. Where all labels are the same, there is no `auroc` and no `r2`.
    """
    from sklearn.metrics import roc_auc_score

    margins, good, probabilities = labels * logits, (labels > 0).astype(float), expit(logits)
    spread = float(np.square(good - good.mean()).sum())
    return {
        "accuracy": float(np.mean((margins > 0) + 0.5 * (margins == 0))),
        "auroc": float(roc_auc_score(good, logits)) if spread else None,
        "loss": float(np.mean(np.logaddexp(0, -margins))),
        "margin": float(margins.mean()),
        "mae": float(np.abs(probabilities - good).mean()),
        "r2": 1 - float(np.square(probabilities - good).sum()) / spread if spread else None,
        "ece": calibration_error(probabilities, good),
    }


def calibration_error(probabilities: np.ndarray, good: np.ndarray) -> float:
    """Mean distance of probability and share of good ratings over BINS bins. Source: Naeini et al. (2015)."""
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, probabilities - good, minlength=BINS)
    return float(np.abs(gaps).sum() / len(good))


def constant_error(train: np.ndarray, test: np.ndarray) -> float:
    """The mean absolute error of always saying what most training labels say: the best that a constant can do."""
    return float(np.mean(test != (1 if train.mean() >= 0 else -1)))
