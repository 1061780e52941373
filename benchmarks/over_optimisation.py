"""Over-optimisation on the embedded world: policies that maximise a reward model which loves length.

python benchmarks/over_optimisation.py --folder /tmp/over --seeds 1 2 3 4 5

Annotators who take the longer answer for the better one label the pairs, a reward model believes them, and PPO
maximises it without a leash: once with a watch that warns, and once with one that stops. A seed has a world, models and
policies of its own; what a folder holds already is not run again. Needs about ten minutes of a core per seed.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from rlhf.curves import CurveRecorder, no_log, write_json
from rlhf.params import Params
from tasks import policy
from tasks.paths import Paths
from worlds import prepare_world, read_values

ROOT = Path(__file__).resolve().parents[1]
LENGTH_LOVING = {"rate": 0.45, "class_conditional": 0.0, "instance_dependent": 0.0, "length_loving": 1.0}
COLUMNS = (
    "seed",
    "watch",
    "rollouts",
    "gold at the start",
    "highest",
    "at the end",
    "saved",
    "proxy",
    "tokens",
    "named at",
)


def main() -> None:
    """Run what is missing; print a row per seed and reaction, and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--figure", type=Path, help="where to draw gold and proxy over the steps")
    options = parser.parse_args()
    logging.getLogger("rlhf.watch").setLevel(logging.ERROR)
    looks = {seed: run(options.folder / f"seed-{seed}", seed) for seed in tqdm(options.seeds, unit="seed")}
    print(f"| {' | '.join(COLUMNS)} |")
    print("|" + "---|" * len(COLUMNS))
    for seed, one in looks.items():
        for reaction, rows in one.items():
            print(describe(seed, reaction, rows))
    if options.figure:
        draw(options.figure, looks)


def run(folder: Path, seed: int) -> dict[str, list[dict[str, float]]]:
    """What the watch saw, look by look, with each reaction."""
    looks = {}
    for reaction in ("warn", "stop"):
        params = make_params(seed, reaction)
        paths = Paths(folder)
        done = folder / f"{reaction}.json"
        if not done.exists():
            prepare_world(params, paths)
            curves = CurveRecorder(no_log)
            policy.run(params, paths, curves, "ppo")
            write_json(done, [{"step": step, **row} for step, row in sorted(curves.rows.items()) if is_look(row)])
        looks[reaction] = json.loads(done.read_text(encoding="utf-8"))
    return looks


def is_look(row: dict[str, float]) -> bool:
    return "watch/gold_reward" in row


def make_params(seed: int, reaction: str) -> Params:
    """params.yaml with annotators who love length, and PPO on nothing but what they taught."""
    values = read_values(ROOT / "params.yaml", seed)
    values["prepare"]["world"]["noise"] = LENGTH_LOVING
    values["probe"]["on_hackable"] = "warn"
    values["reward"] |= {"objective": "bradley_terry", "noise_rate": 0.0}
    values["policies"] = {"ppo": values["policies"]["ppo"]}
    values["policies"]["ppo"] |= {"rewards": {"reward_model": {"kind": "reward_model", "weight": 1.0}}, "beta": 0.0}
    values["evaluate"]["watch"] |= {"evaluations": 10, "on_over_optimisation": reaction}
    return Params.model_validate(values)


def describe(seed: int, reaction: str, rows: list[dict[str, float]]) -> str:
    gold = [row["watch/gold_reward"] for row in rows]
    saved = {row["step"]: row for row in rows}[rows[-1]["watch/saved_step"]]
    named = [f"{row['step']:g}" for row in rows if row["watch/over_optimised"]]
    cells = [
        f"{seed}",
        reaction,
        f"{rows[-1]['step']:g}",
        *(f"{value:.3f}" for value in (gold[0], max(gold), gold[-1], saved["watch/gold_reward"])),
        " → ".join(f"{row['watch/proxy_reward']:.2f}" for row in (rows[0], rows[-1])),
        " → ".join(f"{row['watch/mean_tokens']:.1f}" for row in (rows[0], rows[-1])),
        ", ".join(named) or "–",
    ]
    return f"| {' | '.join(cells)} |"


def draw(path: Path, looks: dict[int, dict[str, list[dict[str, float]]]]) -> None:
    """Gold and proxy over the steps, a line per seed; crosses where over-optimisation was named."""
    figure = Figure(figsize=(10.8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for axis, name, title in zip(axes, ("gold_reward", "proxy_reward"), ("gold reward", "proxy reward"), strict=True):
        for number, (seed, one) in enumerate(looks.items()):
            steps = [row["step"] for row in one["warn"]]
            values = [row[f"watch/{name}"] for row in one["warn"]]
            axis.plot(steps, values, ".-", color=f"C{number}", label=f"seed {seed}")
            named = [(row["step"], row[f"watch/{name}"]) for row in one["warn"] if row["watch/over_optimised"]]
            if named:
                axis.plot(*zip(*named, strict=True), "x", color=f"C{number}", markersize=8)
        axis.set(xlabel="rollouts", ylabel=title)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
