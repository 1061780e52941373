"""Who wins, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

QUANTILE = 1.959963984540054
"""Of the standard normal distribution, for two-sided 95 %."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def compare(ours: Sequence[float], theirs: Sequence[float], quantile: float = QUANTILE) -> Estimate:
    """The share of prompts on which `ours` is the higher reward, ties counting half, with a 95 % interval.

    Another `quantile` of the normal distribution gives another interval.
    Raises ValueError where the lengths differ or there is nothing to compare.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"{len(ours)} rewards against {len(theirs)}; give one of each per prompt, at least one prompt")
    wins = sum(a > b for a, b in zip(ours, theirs, strict=True))
    losses = sum(a < b for a, b in zip(ours, theirs, strict=True))
    low, high = score_interval(wins, losses, len(ours), quantile)
    return Estimate(0.5 + (wins - losses) / (2 * len(ours)), 0.5 + low / 2, 0.5 + high / 2)


def score_interval(wins: int, losses: int, prompts: int, quantile: float = QUANTILE) -> tuple[float, float]:
    """The score interval, 95 % by default, of P(win) − P(loss) from paired outcomes, ties included. Source: Tango,
    Statistics in Medicine 17 (1998) 891–908.

    The differences Δ that a score test does not reject. Unlike the bootstrap or the normal approximation it does not
    shrink to a point where a handful of prompts are all won or all tied.
    """
    observed = (wins - losses) / prompts

    def statistic(delta: float) -> float:
        # The likeliest P(loss) if the difference were Δ, from the trinomial likelihood.
        b = (2 * prompts - wins + losses) * delta - wins - losses
        c = -losses * delta * (1 - delta)
        loss = (math.sqrt(max(0.0, b * b - 8 * prompts * c)) - b) / (4 * prompts)
        variance = prompts * (2 * loss + delta * (1 - delta))
        return (wins - losses - prompts * delta) / math.sqrt(variance) if variance > 0 else math.inf

    low = _bisect(lambda delta: statistic(delta) > quantile, -1.0, observed)
    high = _bisect(lambda delta: statistic(delta) > -quantile, observed, 1.0)
    return low, high


def _bisect(is_below: Callable[[float], bool], low: float, high: float) -> float:
    """The place between `low` and `high` where `is_below` turns from true to false."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return (low + high) / 2


def estimate_share(values: Sequence[float]) -> Estimate:
    """The share of ones among zeros and ones, with Wilson's 95 % interval, which has width even where all are equal."""
    count, share = len(values), sum(values) / len(values)
    centre = (share + QUANTILE**2 / (2 * count)) / (1 + QUANTILE**2 / count)
    spread = math.sqrt(share * (1 - share) / count + (QUANTILE / (2 * count)) ** 2)
    half = QUANTILE * spread / (1 + QUANTILE**2 / count)
    return Estimate(share, min(share, centre - half), max(share, centre + half))


def estimate_mean(values: Sequence[float]) -> Estimate:
    """The mean with its 95 % interval by the normal approximation."""
    count, mean = len(values), sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, count - 1)
    half = QUANTILE * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half)
