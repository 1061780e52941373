"""The KL–reward frontier: what each policy gained at which distance from the SFT model, in training and after it."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path

from rlhf.curves import rounded_number
from rlhf.evaluation.comparison import Estimate, estimate_mean
from rlhf.evaluation.yardstick import SFT, Measured, Yardstick

BEST_OF = "best of n"


@dataclass(frozen=True)
class Point:
    """A policy after `step` steps (None: as it was saved), or for BEST_OF the best of `step` answers.

    `kl` is in nats per answer; `proxy` is None where there is no reward model.
    """

    policy: str
    step: int | None
    kl: float
    gold: Estimate
    proxy: Estimate | None


@dataclass(frozen=True)
class Frontier:
    """The states of each policy as it trained, each policy as it was saved, and the SFT model's best of n answers."""

    paths: dict[str, list[Point]]
    saved: dict[str, Point]
    best_of: list[Point]

    def area(self, policy: str, budget: float) -> float:
        """The gold reward gained over the SFT model within a KL of k nats per answer, averaged over k up to `budget`.

        From the states as it trained; where nothing was looked at, from the saved one.
        """
        states = self.paths.get(policy) or [self.saved[SFT], self.saved[policy]]
        return area_under([(state.kl, state.gold.mean) for state in states], budget)

    def points(self) -> list[Point]:
        return [*self.saved.values(), *(point for path in self.paths.values() for point in path), *self.best_of]

    def write(self, path: Path) -> None:
        """Every point as a row of a CSV file."""
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            sides = [f"{reward}_reward{end}" for reward in ("gold", "proxy") for end in ("", "_low", "_high")]
            writer.writerow(["policy", "step", "kl_to_sft", *sides])
            for point in self.points():
                estimates = [(one.mean, one.low, one.high) if one else (None,) * 3 for one in (point.gold, point.proxy)]
                figures = [rounded_number(value) for estimate in estimates for value in estimate]
                writer.writerow([point.policy, point.step, rounded_number(point.kl), *figures])


def trace_frontier(yardstick: Yardstick, measured: Mapping[str, Measured], curves: Mapping[str, Path]) -> Frontier:
    """Read what was seen while policies trained from their curves.csv, and draw the SFT model's best of n answers."""
    return Frontier(
        paths={name: path for name, file in curves.items() if (path := read_path(name, file))},
        saved={name: _saved(name, one) for name, one in measured.items()},
        best_of=_draw_best_of(yardstick, measured[SFT]),
    )


def _saved(name: str, one: Measured) -> Point:
    proxy = estimate_mean(one.proxy) if one.proxy else None
    return Point(name, None, estimate_mean(one.kl).mean, one.interval, proxy)


def read_path(policy: str, curves: Path) -> list[Point]:
    """The looks that a curves.csv holds, in the order of steps; none where nobody looked."""
    with curves.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("watch/gold_reward")]
    return [
        Point(
            policy,
            int(row["step"]),
            float(row["watch/kl_to_sft"]),
            _estimate(row, "gold"),
            _estimate(row, "proxy") if row.get("watch/proxy_reward") else None,
        )
        for row in rows
    ]


def _estimate(row: Mapping[str, str], reward: str) -> Estimate:
    mean, low, high = (float(row[f"watch/{reward}_reward{end}"]) for end in ("", "_low", "_high"))
    return Estimate(mean, low, high)


def area_under(states: Iterable[tuple[float, float]], budget: float) -> float:
    """The mean over k in [0, budget] of the highest reward at a KL of at most k, above that of the first state.

    `states` are (KL, reward), the untrained one first. A state beyond the budget counts for nothing.
    """
    start, *others = ((max(0.0, kl), reward) for kl, reward in states)
    area, best, reached = 0.0, start[1], 0.0
    for kl, reward in sorted(others):
        if kl >= budget:
            break
        area += (kl - reached) * (best - start[1])
        best, reached = max(best, reward), kl
    return (area + (budget - reached) * (best - start[1])) / budget


# best of n ----------------------------------------------------------------------------------------


def _draw_best_of(yardstick: Yardstick, sft: Measured) -> list[Point]:
    """The best by the reward model of n = 2, 4, 8 … up to `best_of` answers of the SFT model; none without one."""
    count = yardstick.params.best_of
    if count is None or yardstick.proxy is None or sft.proxy is None:
        return []
    gold, proxy = [sft.gold], [sft.proxy]
    for draw in range(1, count):
        answers = yardstick.answer(yardstick.reference, yardstick.params.temperature, draw)
        gold.append(yardstick.reward(yardstick.gold, answers))
        proxy.append(yardstick.reward(yardstick.proxy, answers))
    by_prompt = list(zip(zip(*gold, strict=True), zip(*proxy, strict=True), strict=True))
    sizes = [2**power for power in range(1, count.bit_length()) if 2**power <= count]
    return [
        Point(
            BEST_OF,
            size,
            math.log(size) - (size - 1) / size,
            estimate_mean([expected_best(golds, proxies, size) for golds, proxies in by_prompt]),
            estimate_mean([expected_best(proxies, proxies, size) for _, proxies in by_prompt]),
        )
        for size in sizes
    ]


def expected_best(values: Sequence[float], scores: Sequence[float], size: int) -> float:
    """The mean value of the answer with the highest score among `size` of all answers to one prompt, over all choices.

    The answer of rank i (from 1, scores rising) of N is the best of C(i − 1, size − 1) choices out of C(N, size). The
    distance of best-of-n sampling from its model is at most log n − (n − 1)/n nats (Beirami et al., arXiv 2401.01879).
    """
    ranked = [values[place] for place in sorted(range(len(scores)), key=scores.__getitem__)]
    return sum(value * comb(rank, size - 1) for rank, value in enumerate(ranked)) / comb(len(ranked), size)
