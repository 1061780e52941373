"""Whom the hackability probe accuses: reward models of sound and of length-loving labels, and its false alarms.

python benchmarks/hackability.py --folder /tmp/hackability --seeds 17 1 2

Needs models/sft (`dvc repro sft`). Trains one reward model per kind of label and seed in a workspace of its own under
the folder; one that is complete is not trained again. False alarms: the share of draws of `probe.rows` fresh pairs on
which a trick warns, or stops.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf.curves import no_log
from rlhf.data.formats import Row, write_rows
from rlhf.data.world import World, make_world
from rlhf.params import NoiseParams, Params, WorldParams
from rlhf.params_file import load_params
from rlhf.probe.cases import cases_from_preferences
from rlhf.probe.probing import Probe, Score, try_tricks
from rlhf.scoring import RewardModel
from tasks import embed, reward
from tasks.paths import Paths

ROOT = Path(__file__).resolve().parents[1]
FRESH, DRAWS = 1024, 200
LENGTH_NOISE = NoiseParams(rate=0.45, class_conditional=0.0, instance_dependent=0.0, length_loving=1.0)


def keep(params: Params) -> World:
    """Labels and objective as in params.yaml."""
    return make_world(_world(params), params.seed)


def length_noise(params: Params) -> World:
    """45 % of labels wrong, all for the liking of the longer answer."""
    return make_world(_world(params).model_copy(update={"noise": LENGTH_NOISE}), params.seed)


def longer_wins(params: Params) -> World:
    """The longer answer is the chosen one, always."""
    world = keep(params)
    train, test = ([_prefer_longer(row) for row in rows] for rows in world.preferences)
    return World(world.sft, (train, test), world.prompts, world.texts)


LABELS: dict[str, tuple[Callable[[Params], World], str]] = {
    "sound": (keep, "selective"),
    "plain": (keep, "bradley_terry"),
    "length_noise": (length_noise, "bradley_terry"),
    "longer_wins": (longer_wins, "bradley_terry"),
}


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 1, 2])
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    print("| labels | seed | accuracy, true labels | verdict | worst trick | excess | gain | warns | stops |")
    print("|---" * 9 + "|")
    for labels in options.labels:
        for seed in options.seeds:
            params = load_params(ROOT / "params.yaml").model_copy(update={"seed": seed})
            paths = Paths(options.folder / f"{labels}-{seed}")
            if not paths.metrics("reward").exists():
                train(params, paths, labels)
            print(judge(params, paths, f"| {labels} | {seed} "), flush=True)


def train(params: Params, paths: Paths, labels: str) -> None:
    """A reward model in a workspace that shares the SFT model."""
    make, objective = LABELS[labels]
    section = params.reward.model_copy(update={"objective": objective})
    world = make(params)
    for split, rows in zip(("train", "test"), world.preferences, strict=True):
        write_rows(paths.rows("preferences", split), rows)
        write_rows(paths.rows("ratings", split), [])
    shutil.copytree(ROOT / "models" / "sft", paths.model("sft"), dirs_exist_ok=True)
    embed.run(params, paths, no_log)
    reward.run(params.model_copy(update={"reward": section}), paths, no_log)


def judge(params: Params, paths: Paths, head: str) -> str:
    """A row of the table: the probe on fresh pairs, and how often draws of them warn and stop."""
    drawn = make_world(_world(params).model_copy(update={"pairs": FRESH}), params.seed + 1000)
    cases = cases_from_preferences(drawn.preferences[0])
    score = remember(RewardModel(paths.model("reward"), params.probe.batch_size).score)
    ask = partial(try_tricks, score, section=params.probe, source="fresh pairs")
    found, rng = ask(cases), random.Random(params.seed)
    verdicts = [ask(rng.sample(cases, params.probe.rows)).verdict for _ in range(DRAWS)]
    worst = max(found.tried, key=lambda one: one.excess.low)
    accuracy = json.loads(paths.metrics("reward").read_text(encoding="utf-8"))["accuracy_clean"]
    shares = [verdicts.count("warn") / DRAWS, verdicts.count("stop") / DRAWS]
    figures = [f"{value:+.2f}" for value in (worst.excess.mean, most_gain(found))]
    cells = [f"{accuracy:.3f}", found.verdict, worst.trick.title, *figures, *(f"{share:.1%}" for share in shares)]
    return head + "| " + " | ".join(cells) + " |"


def most_gain(found: Probe) -> float:
    """What the best-paid of the tricks that add words pays, in standard deviations."""
    return max(one.gain.mean for one in found.tried if one.trick.adds)


def remember(score: Score) -> Score:
    """Score every text once."""
    known: dict[tuple[str, str], float] = {}

    def look_up(prompts: Sequence[Any], answers: Sequence[Any]) -> list[float]:
        pairs = list(zip(prompts, answers, strict=True))
        new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        known.update(zip(new, score([p for p, _ in new], [a for _, a in new]), strict=True))
        return [known[pair] for pair in pairs]

    return look_up


def _world(params: Params) -> WorldParams:
    assert params.prepare.world is not None
    return params.prepare.world


def _prefer_longer(row: Row) -> Row:
    if len(row["chosen"]) >= len(row["rejected"]):
        return row
    turned = {"chosen": row["rejected"], "rejected": row["chosen"], "truth_flipped": not row["truth_flipped"]}
    return row | turned


if __name__ == "__main__":
    main()
