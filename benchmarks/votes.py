"""How well majority, Dawid-Skene and MACE recover the gold labels of UKPConvArg1 from its crowd votes.

python benchmarks/votes.py ../shared/data/ukpconvarg1/pairs_5annotators.jsonl.gz --seeds 0 1 2 3 4

Ties are no votes. All pairs with a vote teach the methods; accuracy is on those with a gold winner. The gold label was
itself estimated from the five votes, by MACE with a threshold, so that "all five" is a check and no test.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np

from rlhf.data.annotators import AGGREGATES, Votes, describe_agreement
from rlhf.data.files import read_file
from rlhf.data.formats import Row

SIDES = {"a1": 0, "a2": 1}


def main() -> None:
    """Print a line of a table per method and number of votes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    pairs = read_file(arguments.file, str(arguments.file)).rows
    print(
        "| votes | method | all pairs, ties half right | majority decides | majority is tied |\n|---|---|---|---|---|"
    )
    for drawn, seeds in ((None, [0]), (3, arguments.seeds)):
        samples = [draw_votes(pairs, drawn, seed) for seed in seeds]
        for method, aggregate in AGGREGATES.items():
            figures = np.array([accuracies(aggregate(votes), votes, gold) for votes, gold in samples])
            cells = [f"{mean:.3f} ± {spread:.3f}" for mean, spread in zip(figures.mean(0), figures.std(0), strict=True)]
            print(f"| {drawn or 'all five'} | {method} | {' | '.join(cells)} |", flush=True)
    print(describe_agreement(draw_votes(pairs, None, 0)[0]))


def draw_votes(pairs: list[Row], count: int | None, seed: int) -> tuple[Votes, np.ndarray]:
    """The votes that are no ties, of `count` workers drawn per pair, and (pairs,) gold, NaN where there is none."""
    draw = random.Random(seed)
    listed: list[tuple[str, str, int]] = []
    for pair in pairs:
        given = pair["annotations"]
        given = draw.sample(given, min(count, len(given))) if count else given
        listed += [(pair["id"], vote["worker"], SIDES[vote["value"]]) for vote in given if vote["value"] in SIDES]
    names, numbers = np.unique([name for name, _, _ in listed], return_inverse=True)
    workers = np.unique([worker for _, worker, _ in listed], return_inverse=True)[1]
    gold = {pair["id"]: SIDES.get(pair["gold"], np.nan) for pair in pairs}
    return Votes(numbers, workers, np.array([side for _, _, side in listed])), np.array([gold[name] for name in names])


def accuracies(chances: np.ndarray, votes: Votes, gold: np.ndarray) -> tuple[float, float, float]:
    """On all pairs with a gold winner, on those that the majority decides, and on those where it is tied."""
    right = np.where(chances == 0.5, 0.5, (chances > 0.5) == gold)
    known, tied = ~np.isnan(gold), AGGREGATES["majority"](votes) == 0.5
    return float(right[known].mean()), float(right[known & ~tied].mean()), float(right[known & tied].mean())


if __name__ == "__main__":
    main()
