"""Statistics over a few repetitions: intervals of means, and p-values of many comparisons at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import t


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean by Student's t; not a number for a single value."""
    count = len(values)
    return float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count)) if count > 1 else float("nan")


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Corrected p-values: the smallest times the number of tests, the next times one less, never falling.

    Source: Holm (1979). A simple sequentially rejective multiple test procedure. Scandinavian Journal of Statistics 6.
    """
    corrected, worst = {}, 0.0
    for place, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, (len(p_values) - place) * p_value))
        corrected[name] = worst
    return corrected
