"""Every method of recipes/all-methods.yaml on the embedded world: rewards, distance, time, memory, significance.

python benchmarks/methods.py --folder /tmp/methods --seeds 1 2 3 4 5 --parallel 2

A seed has a world, an SFT model and a reward model of its own, which all its methods share; differences are paired by
seed. Each training is a process of its own. What the folder holds already is not run again. About an hour of a core per
seed. --results keeps the figures of every seed in a file; the table is over all that it holds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import ttest_1samp
from tqdm import tqdm

from over_seeds import half_width, holm
from ppo_measures import peak_mib
from rlhf.curves import no_log, write_json
from rlhf.params import Params
from rlhf.params.policies import SamplingParams
from tasks import evaluate, policy
from tasks.paths import Paths
from worlds import prepare_world, read_values

ROOT = Path(__file__).resolve().parents[1]
SFT, YARD = "sft", "ppo"
"""What all methods are compared with: where they start, and the method that most people know."""
FIGURES = ("gold_reward", "gold_reward_greedy", "win_rate", "proxy_reward", "kl_to_sft", "frontier_area", "mean_tokens")
COSTS = ("processor_seconds", "peak_mib")
COLUMNS = ("method", *FIGURES, *COSTS, "gold − SFT's", "gold − PPO's")

Results = dict[str, dict[str, dict[str, float]]]
"""By seed, method and figure; nothing where it was not measured."""


def main() -> None:
    """Run what is missing; print the table and draw gold against KL."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--methods", nargs="+", help="only these, beside ppo")
    parser.add_argument("--parallel", type=int, default=1, help="trainings at a time")
    parser.add_argument("--results", type=Path, help="JSON file of the figures of further seeds, to be added to")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.folder, options.seeds[0], options.train)
        return
    run_missing(options.folder, options.seeds, options.methods, options.parallel)
    results = read_results(options.folder, options.seeds)
    if options.results:
        known: Results = json.loads(options.results.read_text()) if options.results.exists() else {}
        results = dict(sorted((known | results).items()))
        write_json(options.results, results)
    print("\n".join(table(results)))
    if options.figure:
        draw(options.figure, results)


# running ------------------------------------------------------------------------------------------


def make_params(seed: int, methods: Sequence[str] | None) -> Params:
    values = read_values(ROOT / "recipes" / "all-methods.yaml", seed)
    values["probe"]["on_hackable"] = "warn"
    if methods:
        values["policies"] = {name: values["policies"][name] for name in dict.fromkeys((YARD, *methods))}
    return Params.model_validate(values)


def world(folder: Path, seed: int) -> Paths:
    return Paths((folder / f"seed-{seed}").resolve())


def cost_file(paths: Paths, method: str) -> Path:
    return paths.root / "costs" / f"{method}.json"


def train(folder: Path, seed: int, method: str) -> None:
    """One training, in this process; leaves what it took."""
    paths = world(folder, seed)
    began, processor = time.perf_counter(), time.process_time()
    policy.run(make_params(seed, [method]), paths, no_log, method)
    cost = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - processor}
    write_json(cost_file(paths, method), {**cost, "peak_mib": peak_mib()})


def run_missing(folder: Path, seeds: Sequence[int], methods: Sequence[str] | None, parallel: int) -> None:
    """Worlds one after the other, trainings `parallel` at a time, then the evaluation of each world."""
    for seed in tqdm(seeds, desc="worlds", unit="seed"):
        prepare_world(make_params(seed, methods), world(folder, seed))
    jobs = [
        (seed, method)
        for seed in seeds
        for method in make_params(seed, methods).policies
        if not cost_file(world(folder, seed), method).exists()
    ]
    with ThreadPoolExecutor(parallel) as pool:
        runs = pool.map(lambda job: run_process(folder, *job), jobs)
        list(tqdm(runs, desc="trainings", total=len(jobs)))
    for seed in tqdm(seeds, desc="evaluations", unit="seed"):
        params, paths = make_params(seed, methods), world(folder, seed)
        measured = paths.metrics("evaluate")
        if not measured.exists() or set(json.loads(measured.read_text())) != {SFT, *params.policies}:
            evaluate.run(params, paths, no_log)


def run_process(folder: Path, seed: int, method: str) -> None:
    """A training in a process of its own, its output in a file."""
    paths = world(folder, seed)
    command = [sys.executable, __file__, "--folder", str(folder), "--seeds", str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    output = paths.root / "output" / f"{method}.txt"
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w") as file:
        subprocess.run(
            [*command, "--train", method], env=environment, stdout=file, stderr=subprocess.STDOUT, check=True
        )


# figures ------------------------------------------------------------------------------------------


def read_results(folder: Path, seeds: Sequence[int]) -> Results:
    results: Results = {}
    for seed in seeds:
        paths = world(folder, seed)
        rows = results.setdefault(str(seed), {})
        for method, figures in json.loads(paths.metrics("evaluate").read_text()).items():
            file = cost_file(paths, method)
            costs: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
            rows[method] = {name: (figures | costs)[name] for name in (*FIGURES, *COSTS) if name in figures | costs}
    return results


def column(results: Results, method: str, name: str) -> list[float]:
    """A method's figure by each seed that has it."""
    rows = (methods.get(method, {}) for methods in results.values())
    return [row[name] for row in rows if name in row]


def by_gold(results: Results) -> list[str]:
    """The methods, the highest mean gold reward first."""
    methods = dict.fromkeys(method for rows in results.values() for method in rows)
    return sorted(methods, key=lambda method: -float(np.mean(column(results, method, "gold_reward"))))


def table(results: Results) -> list[str]:
    """A row per method: means with half the width of their 95 % interval over seeds."""
    tests = {rival: differences(results, rival) for rival in (SFT, YARD)}
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for method in by_gold(results):
        cells = [describe(name, column(results, method, name)) for name in (*FIGURES, *COSTS)]
        lines.append(f"| {' | '.join([method, *cells, *(tests[rival].get(method, '–') for rival in tests)])} |")
    return lines


def describe(name: str, values: Sequence[float]) -> str:
    if not values:
        return "–"
    digits = {"processor_seconds": 0, "peak_mib": 0, "mean_tokens": 1, "kl_to_sft": 2, "proxy_reward": 2}.get(name, 3)
    return f"{np.mean(values):.{digits}f} ± {half_width(values):.{digits}f}"


def gold_gaps(results: Results, method: str, rival: str) -> list[float]:
    """By how much the gold reward lies above a rival's, by each seed that has both."""
    rows = [rows for rows in results.values() if method in rows]
    return [row[method]["gold_reward"] - row[rival]["gold_reward"] for row in rows]


def differences(results: Results, rival: str) -> dict[str, str]:
    """The paired difference in gold reward to a rival, with Holm's p over all methods by paired t tests."""
    gaps = {method: gold_gaps(results, method, rival) for method in by_gold(results) if method not in (rival, SFT)}
    corrected = holm({name: p_value(gap) for name, gap in gaps.items()})
    return {name: f"{np.mean(gap):+.3f} (p {corrected[name]:.3f})" for name, gap in gaps.items()}


def p_value(gap: Sequence[float]) -> float:
    """Of a paired t test, two-sided; 1 for a single pair, and where there is no difference at all."""
    if len(gap) < 2 or not any(gap):
        return 1.0
    test: Any = ttest_1samp(gap, 0.0)
    return float(test.pvalue)


def draw(path: Path, results: Results) -> None:
    """Each method's gain in gold reward over its SFT model, and its KL: means with 95 % intervals over seeds."""
    methods = [method for method in by_gold(results) if method != SFT][::-1]
    gains = {method: gold_gaps(results, method, SFT) for method in methods}
    distances = {method: column(results, method, "kl_to_sft") for method in methods}
    sampled = {name for name, section in make_params(1, None).policies.items() if isinstance(section, SamplingParams)}
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    for panel, values in zip(panels, (gains, distances), strict=True):
        for place, (method, found) in enumerate(values.items()):
            colour = "C0" if method in sampled else "C1"
            panel.errorbar(np.mean(found), place, xerr=half_width(found), fmt="o", color=colour, elinewidth=1)
        panel.grid(axis="x", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].axvline(0, color="black", linewidth=0.8)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_xlabel("right answers beyond the SFT model's")
    panels[1].set(xlabel="KL, nats per answer", xlim=(-0.1, 4))
    for colour, label in (("C0", "learns from its own answers"), ("C1", "learns from pairs")):
        panels[0].plot([], [], "o", color=colour, label=label)
    panels[0].legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
