"""Whether the answer that was shown first wins more often than half the time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FirstShown:
    """How often the answer shown first was chosen, of so many rows, with Wilson's 95 % interval."""

    rows: int
    share: float
    low: float
    high: float


def judge_position(is_first_chosen: np.ndarray) -> FirstShown | None:
    """From one boolean per verdict, `(verdicts,)`; None where there is none.

    The share of an unbiased annotator is a half if orders are drawn at random or every pair is shown in both.
    """
    from scipy.stats import binomtest

    if not len(is_first_chosen):
        return None
    test = binomtest(int(is_first_chosen.sum()), len(is_first_chosen))
    low, high = test.proportion_ci(0.95, method="wilson")
    return FirstShown(len(is_first_chosen), float(is_first_chosen.mean()), float(low), float(high))
