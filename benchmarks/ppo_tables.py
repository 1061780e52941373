"""The tables and the figure of benchmarks/ppo.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from over_seeds import half_width

PARTS = ("throughput", "learning")
SIDES = ("ours", "trl")
Runs = dict[str, list[dict[str, Any]]]
"""By side, the results of its seeds in order."""


def show_throughput(runs: Runs, batch_size: int) -> None:
    """Episodes per second (median rollout after the first), the same by processor time, and peak memory."""
    print("\n| side | episodes/s, median (range) | per processor second | peak MiB |\n|---|---|---|---|")
    speed: dict[str, np.ndarray] = {}
    peaks: dict[str, float] = {}
    for side, results in runs.items():
        clock, processor = (
            np.array([batch_size / np.median(result["result"][name][1:]) for result in results])
            for name in ("seconds", "processor_seconds")
        )
        speed[side] = clock
        peaks[side] = float(np.median([result["result"]["peak_mib"] for result in results]))
        print(f"| {side} | {spread(clock, 1)} | {spread(processor, 1)} | {peaks[side]:.0f} |")
    ratios = speed["ours"] / speed["trl"]
    print(f"\nepisodes/s, ratio per pair: {spread(ratios, 2)}; peak memory, ratio: {peaks['ours'] / peaks['trl']:.2f}")


def spread(values: np.ndarray, digits: int) -> str:
    """Median and range."""
    return f"{np.median(values):.{digits}f} ({values.min():.{digits}f}–{values.max():.{digits}f})"


def show_learning(runs: Runs) -> None:
    """Rewards at one KL that every run reached, where each ended, and the time to a reward that both sides reach."""
    reached = min(max(row["kl"] for row in run["evaluation"]) for results in runs.values() for run in results)
    print(f"\n| side | proxy at {reached:.2f} nats | gold at {reached:.2f} nats | last: proxy | gold | KL | tokens |")
    print("|---" * 7 + "|")
    for side, results in runs.items():
        cells = [interval([at_distance(run["evaluation"], name, reached) for run in results]) for name in REWARDS]
        cells += [interval([run["evaluation"][-1][name] for run in results]) for name in (*REWARDS, "kl", "tokens")]
        print(f"| {side} | " + " | ".join(cells) + " |")
    target = min(float(np.median([run["evaluation"][-1]["proxy"] for run in results])) for results in runs.values())
    times = {side: [time_to(run, target) for run in results] for side, results in runs.items()}
    shown = "; ".join(f"{side} {', '.join(say(one) for one in found)}" for side, found in times.items())
    print(f"\nseconds of training to a proxy reward of {target:.3f}, seed by seed: {shown}")


REWARDS = ("proxy", "gold")


def at_distance(rows: list[dict[str, float]], name: str, kl: float) -> float:
    """The reward at that KL, on straight lines between the snapshots in the order of their KL."""
    ordered = sorted(rows, key=lambda row: row["kl"])
    return float(np.interp(kl, [row["kl"] for row in ordered], [row[name] for row in ordered]))


def interval(values: list[float]) -> str:
    """The mean over seeds with its 95 % interval, by Student's t."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {half_width(values):.3f}"


def time_to(run: dict[str, Any], target: float) -> float | None:
    """Seconds of training until the first snapshot whose proxy reward is at least `target`; None where none is."""
    seconds = np.cumsum(run["result"]["seconds"])
    for row in run["evaluation"]:
        if row["proxy"] >= target:
            return float(seconds[int(row["step"]) - 1]) if row["step"] else 0.0
    return None


def say(seconds: float | None) -> str:
    """Seconds, or that there are none."""
    return "never" if seconds is None else f"{seconds:.0f}"


def draw(runs: Runs, path: Path) -> None:
    """Proxy and gold reward against the KL, one line per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, name in zip(panels, REWARDS, strict=True):
        for side, colour in zip(SIDES, ("#b3261e", "#33658a"), strict=True):
            for place, run in enumerate(runs[side]):
                rows = run["evaluation"]
                panel.plot(
                    [row["kl"] for row in rows],
                    [row[name] for row in rows],
                    color=colour,
                    label=side if place == 0 else None,
                    linewidth=1,
                )
        panel.set_xlabel("KL to the SFT model, nats per answer")
        panel.set_ylabel(f"{name} reward")
        panel.legend()
    figure.savefig(path, dpi=110)
