r"""Objectives of the reward model under label noise: a score head on frozen embeddings of texts.

The texts are crowd-judged arguments (UKPConvArg1), or sentences of films' reviews (--pairs …/stsa.binary.train), of
which the positive one of two is the better.

Every run trains on noisy labels of nine debates, chooses its weight decay by those of three, and is tested on the gold
labels of four others.
Results go to one file per cell in --folder; what is there is not run again. --rows takes a regular expression of the
trainings' names, "head decay objective": those of the head that memorises are '^mlp 0 '.

    python benchmarks/reward_noise.py --pairs …/ukpconvarg1/pairs_5annotators.jsonl.gz --embedder FOLDER_OR_HUB_ID \
        --folder …/noise [--noise real uniform_40 …] [--seeds 0 1 …] [--rows …]
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import expit
from sklearn.metrics import roc_auc_score
from torch import nn
from tqdm import tqdm

from noise_data import NOISES, Pairs, draw_wrong, load_arguments, load_sentences
from noise_tables import UNTRAINED, draw, show
from rlhf.curves import write_json
from rlhf.label_study import JUDGED, Noise
from rlhf.pairwise import measure_margins
from rlhf.params import TransportParams
from rlhf.reward_losses import OBJECTIVES, TWINS, RewardBatch
from rlhf.selective import mass_schedule, orient_batch
from rlhf.trust import trust_labels

FOLDS = 4
EPOCHS, BATCH, LEARNING_RATE = 20, 256, 1e-3
WARMUP_EPOCHS, RAMP_EPOCHS = 0.0, 4.0
TRANSPORT = TransportParams(
    label_weight=0.1,
    semantic_cost="squared_euclidean",
    scale="max",
    label_cost="cross_entropy",
    self_match_penalty=0.0,
    neighbours=None,
    regularisation=None,
)
DECAYS = {"mlp": (0.0, 30.0), "linear": (10.0, 100.0)}
"""Of AdamW. Without any the MLP memorises every label; below 10 the linear head is no better."""
UNTOLD, BY_TOPIC = " ", " by topic"
TOLD_RATES = {"": 0.0, ", rate -.1": -0.1, ", rate +.1": 0.1}
"""What objectives that judge labels are told instead of the true rate, the difference to it."""
AT_ONCE = ", at once"
"""Without a ramp: what trust condemns is left out from the first batch on."""


class Head(nn.Module):
    """A score for an embedding: linear, or with two hidden layers, which can memorise every label."""

    def __init__(self, dimensions: int, kind: str) -> None:
        super().__init__()
        hidden = [nn.Linear(dimensions, 256), nn.LeakyReLU(), nn.Linear(256, 64), nn.LeakyReLU()]
        self.layers = nn.Sequential(
            *(hidden if kind == "mlp" else []), nn.Linear(64 if kind == "mlp" else dimensions, 1)
        )

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(texts, dimensions) to (texts,)."""
        return self.layers(embeddings).squeeze(-1)


class Training(NamedTuple):
    """A row of the tables: which head is trained, what the objective is told, and how soon it leaves labels out."""

    kind: str
    decay: float
    objective: str
    told: str
    ramp_epochs: float = RAMP_EPOCHS


def train(data: Pairs, pairs: np.ndarray, row: Training, noise: Noise, seed: int) -> Any:
    """Scores (arguments,) of a head trained on (pairs, 2) of chosen and rejected arguments."""
    torch.manual_seed(seed)
    embeddings = torch.from_numpy(data.embeddings)
    heads = nn.ModuleList(Head(embeddings.shape[1], row.kind) for _ in range(2 if row.objective in TWINS else 1))
    optimiser = torch.optim.AdamW(heads.parameters(), LEARNING_RATE, weight_decay=row.decay)
    generator = torch.Generator().manual_seed(seed)
    verdict = noise.verdict()
    chosen, rejected = (embeddings[side] for side in pairs.T)
    for epoch in range(EPOCHS):
        mass = mass_schedule(epoch, WARMUP_EPOCHS, row.ramp_epochs, noise.rate)
        for rows in torch.randperm(len(pairs), generator=generator).split(BATCH):
            margins = [head(chosen[rows]) - head(rejected[rows]) for head in heads]
            doubt = torch.from_numpy(verdict.doubt)[rows].float() if verdict else torch.zeros(len(rows))
            believed = torch.from_numpy(verdict.believed)[rows] if verdict else torch.ones(len(rows), dtype=torch.bool)
            points, logits, labels = orient_batch(chosen[rows] - rejected[rows], margins[0], generator)
            known = (mass, noise.rate, doubt, believed, TRANSPORT)
            batch = RewardBatch(points, logits, labels, *known, peer_logits=labels * margins[-1])
            optimiser.zero_grad()
            OBJECTIVES[row.objective](batch)[0].backward()
            optimiser.step()
    with torch.inference_mode():
        return heads[0](embeddings).numpy()


def list_rows(wanted: re.Pattern[str]) -> dict[str, Training]:
    """The trainings whose name is wanted, by name."""
    rows = {
        f"{kind} {decay:g} {objective}{told}": Training(kind, decay, objective, told)
        for kind, decays in DECAYS.items()
        for objective, told in itertools.product(OBJECTIVES, (UNTOLD, *TOLD_RATES, BY_TOPIC))
        if (objective in JUDGED) == (told != UNTOLD)
        for decay in decays
        if not TOLD_RATES.get(told) or (kind == "mlp" and decay == 0)
    }
    rows |= {
        f"{name}{AT_ONCE}": row._replace(ramp_epochs=0.0)
        for name, row in rows.items()
        if (row.objective, row.told) == ("selective", "")
    }
    return {name: row for name, row in rows.items() if wanted.search(name)}


def run_cell(data: Pairs, noise: str, fold: int, seed: int, rows: dict[str, Training]) -> dict[str, Any]:
    """The rows on one fold with one draw of the noise: trained on nine debates, decays to choose by three others."""
    wrong = draw_wrong(data, noise, np.random.default_rng([seed, fold]))
    debates = np.random.default_rng(0).permutation(data.debate.max() + 1) % FOLDS
    is_test = debates[data.debate] == fold
    is_validation = np.isin(data.debate, np.flatnonzero(debates != fold)[seed % FOLDS :: FOLDS])
    is_train = ~is_test & ~is_validation
    sides = data.label(wrong)
    pairs, flipped = sides[is_train], wrong[is_train]
    rate, topics = float(flipped.mean()), data.topic[is_train].tolist()
    known = {
        told: study(data, pairs, topics, min(0.49, rate), told, seed)
        for told in dict.fromkeys(row.told for row in rows.values())
    }
    gold = np.stack([data.better, data.worse], 1)[is_test]
    longer = data.lengths[gold[:, 0]] - data.lengths[gold[:, 1]]
    results: dict[str, dict[str, float]] = dict(
        zip(UNTRAINED, (measure(np.zeros(len(gold))), measure(longer)), strict=True)
    )
    for name, row in rows.items():
        scores = train(data, pairs, row, known[row.told], seed)
        seen = measure(scores[sides[is_validation, 0]] - scores[sides[is_validation, 1]])
        found = measure(scores[gold[:, 0]] - scores[gold[:, 1]])
        results[name] = {**found, "validation": seen["auroc"]}
    detection = {told: grade_detection(noise, flipped) for told, noise in known.items() if noise.trust}
    return {"rate": rate, "detection": detection, "rows": results}


def study(data: Pairs, pairs: np.ndarray, topics: list[str], rate: float, told: str, seed: int) -> Noise:
    """What an objective is told: the true rate alone, or also trust in each label, by topic or with a wrong rate."""
    if told == UNTOLD:
        return Noise(None, rate, None, None)
    differences, surface = data.tell_apart(pairs)
    if told == BY_TOPIC:
        return Noise(None, rate, None, trust_labels(differences, pairs, rate, seed, topics, surface))
    rate = min(0.49, max(0.0, rate + TOLD_RATES[told]))
    return Noise(None, rate, None, trust_labels(differences, pairs, rate, seed, None, surface))


def grade_detection(noise: Noise, flipped: np.ndarray) -> dict[str, float]:
    """AUROC of the doubts, and precision and recall of the labels that are most likely wrong."""
    verdict, trust = noise.verdict(), noise.trust
    assert verdict
    assert trust
    called = ~verdict.believed
    hits = float((called & flipped).sum())
    return {
        "auroc": float(roc_auc_score(flipped, 1 - trust.right)),
        "precision": hits / max(1, int(called.sum())),
        "recall": hits / max(1, int(flipped.sum())),
    }


def measure(margins: np.ndarray) -> dict[str, float]:
    """Of margins (pairs,) in favour of the better argument; MAE, R² and ECE are those of its probability."""
    right = expit(margins.astype(float))
    sure = np.maximum(right, 1 - right)
    place = np.minimum(((sure - 0.5) * 20).astype(int), 9)
    hit = (margins > 0) + 0.5 * (margins == 0)
    gaps = [np.abs(hit[place == k].mean() - sure[place == k].mean()) * (place == k).mean() for k in np.unique(place)]
    known = measure_margins(margins)
    return {
        "accuracy": known["accuracy"],
        "auroc": known["auroc"],
        "mae": float((1 - right).mean()),
        "r2": float(1 - np.square(1 - right).mean() / 0.25),
        "ece": float(np.sum(gaps)),
    }


def main() -> None:
    """Run what is missing, print the tables and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--embedder", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--noise", nargs="+", choices=NOISES, default=list(NOISES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", type=re.compile, default=re.compile(""), help="only trainings with a name like this")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--results", type=Path, help="file of accuracies, by noise and row one per cell")
    options = parser.parse_args()
    rows = list_rows(options.rows)
    load = load_arguments if "jsonl" in options.pairs.name else load_sentences
    data = load(options.pairs, options.embedder, options.folder / "embeddings.npy")
    if "real" in options.noise and not data.votes:
        parser.error(f"--noise real needs votes, and {options.pairs} has none; name other kinds")
    found: dict[str, list[dict[str, Any]]] = {}
    for noise in options.noise:
        found[noise] = []
        for seed, fold in tqdm([(seed, fold) for seed in options.seeds for fold in range(FOLDS)], desc=noise):
            path = options.folder / f"{noise}-{seed}-{fold}.json"
            cell = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": {}, "detection": {}}
            missing = {name: row for name, row in rows.items() if name not in cell["rows"]}
            if missing:
                run = run_cell(data, noise, fold, seed, missing)
                cell = {**run, **{part: cell[part] | run[part] for part in ("rows", "detection")}}
                path.write_text(json.dumps(cell, indent=1), encoding="utf-8")
            shown = {name: row for name, row in cell["rows"].items() if name in (*UNTRAINED, *rows)}
            found[noise].append(cell | {"rows": shown})
    show(found)
    if options.figure:
        draw(found, options.figure)
    if options.results:
        accuracies = {
            noise: {name: [cell["rows"][name]["accuracy"] for cell in cells] for name in cells[0]["rows"]}
            for noise, cells in found.items()
        }
        kept = json.loads(options.results.read_text(encoding="utf-8")) if options.results.exists() else {}
        write_json(options.results, kept | accuracies)


if __name__ == "__main__":
    main()
