"""How well wrong labels of UKPConvArg1 are found by all others, and whether what is said of them is true.

python benchmarks/label_trust.py --pairs …/ukpconvarg1/pairs_5annotators.jsonl.gz --embedder FOLDER_OR_HUB_ID \
    --folder /tmp/noise [--pairs-drawn 400 1500] [--draws 0 1]

No model is trained. Trust is told the true rate, and the topic where labels go wrong by topic. The last column: of how
many topics that are mostly wrong how many are named by who is not told (rlhf.groupings), and how many others.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from noise_data import NOISES, Pairs, draw_wrong, load_arguments
from rlhf.groupings import Grouping, find_groupings
from rlhf.ratings import calibration_error
from rlhf.trust import trust_labels

BY_TOPIC = ("topics", "mixed")
SURE = 0.9


def main() -> None:
    """Print a row per kind of noise and number of pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--embedder", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--noise", nargs="+", choices=NOISES, default=["real", "uniform_20", "uniform_40", "length"])
    parser.add_argument("--pairs-drawn", type=int, nargs="+", default=[0], help="0: all")
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    data = load_arguments(options.pairs, options.embedder, options.folder / "embeddings.npy")
    print("| noise | pairs | AUROC without the surface | AUROC | ECE | surely wrong | of these wrong | topics named |")
    print("|---" * 8 + "|")
    for count in options.pairs_drawn:
        for noise in tqdm(options.noise):
            found = [grade(data, noise, draw, count or len(data.better)) for draw in options.draws]
            cells = [
                " ".join(one if isinstance(one, str) else f"{one:.3f}" for one in column)
                for column in zip(*found, strict=True)
            ]
            print(f"| {noise} | {count or len(data.better)} | " + " | ".join(cells) + " |", flush=True)


def grade(data: Pairs, noise: str, draw: int, count: int) -> list[float | str]:
    """AUROC without and with the surface; ECE, share of labels surely wrong, how many of these are; topics named."""
    generator = np.random.default_rng([draw, count])
    wrong = draw_wrong(data, noise, generator)
    rows = np.sort(generator.permutation(len(wrong))[:count])
    pairs = data.label(wrong)[rows]
    wrong, topics = wrong[rows], data.topic[rows].tolist() if noise in BY_TOPIC else None
    differences, surface = data.tell_apart(pairs)
    rate, named = float(wrong.mean()), [{"topic": str(topic)} for topic in data.topic[rows]]
    blind, seeing = (
        1 - trust_labels(differences, pairs, rate, draw, topics, seen).right for seen in (surface[:, :0], surface)
    )
    sure = seeing > SURE
    aurocs = [float(roc_auc_score(wrong, said)) for said in (blind, seeing)]
    return [
        *aurocs,
        calibration_error(seeing, wrong),
        float(sure.mean()),
        float(wrong[sure].mean()) if sure.any() else np.nan,
        count_named(data.topic[rows], wrong, find_groupings(named, differences, surface, rate, draw)),
    ]


def count_named(topics: np.ndarray, wrong: np.ndarray, found: list[Grouping]) -> str:
    """How many of the mostly wrong topics are named, of how many, and how many others."""
    mostly = {str(topic) for topic in np.unique(topics) if wrong[topics == topic].mean() > 0.5}
    named = {topic for grouping in found for topic, _ in grouping.wrong}
    return f"{len(named & mostly)}/{len(mostly)}+{len(named - mostly)}"


if __name__ == "__main__":
    main()
