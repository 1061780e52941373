r"""Objectives of the reward model under label noise: a score head on frozen embeddings of crowd-judged arguments.

Every run trains on noisy labels of twelve debates and is tested on the gold labels of four others.
Results go to one file per cell in --folder; what is there is not run again, and several processes may share it.

    python benchmarks/reward_noise.py --pairs …/ukpconvarg1/pairs_5annotators.jsonl.gz --embedder FOLDER_OR_HUB_ID \
        --folder …/noise [--noise real uniform_40 …] [--seeds 0 1 …]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import ttest_rel
from sklearn.metrics import roc_auc_score
from torch import nn
from tqdm import tqdm

from rlhf.data.files import read_file
from rlhf.params import TransportParams
from rlhf.reward import JUDGED, Noise
from rlhf.reward_losses import OBJECTIVES, RewardBatch
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
NOISES = ("real", "uniform_20", "uniform_40", "classes_10_20", "classes_20_10", "length", "topics", "mixed")


@dataclass(frozen=True)
class Arguments:
    """Embedded arguments (arguments, dimensions), and of each pair the better and the worse one by gold."""

    embeddings: np.ndarray
    lengths: np.ndarray
    better: np.ndarray
    worse: np.ndarray
    debate: np.ndarray
    topic: np.ndarray
    votes: list[list[bool]]


def load(path: Path, embedder: str, cache: Path) -> Arguments:
    """The pairs with a gold winner; log length joins the embedding, everything at mean 0 and deviation 1."""
    texts = {row["id"]: row["text"] for row in read_file(path.with_name("arguments.jsonl.gz"), "arguments").rows}
    place = {name: index for index, name in enumerate(texts)}
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, embed(list(texts.values()), embedder))
    lengths = np.log([len(text) for text in texts.values()])
    embeddings = np.hstack([np.load(cache), lengths[:, None]])
    rows = [row for row in read_file(path, "pairs").rows if row["gold"] in ("a1", "a2")]
    sides = [("arg1", "arg2") if row["gold"] == "a1" else ("arg2", "arg1") for row in rows]
    return Arguments(
        ((embeddings - embeddings.mean(0)) / embeddings.std(0)).astype(np.float32),
        lengths,
        np.array([place[row[one]] for row, (one, _) in zip(rows, sides, strict=True)]),
        np.array([place[row[other]] for row, (_, other) in zip(rows, sides, strict=True)]),
        np.unique([row["title"] for row in rows], return_inverse=True)[1],
        np.array([row["topic"] for row in rows]),
        [[vote["value"] == row["gold"] for vote in row["annotations"] if vote["value"] != "equal"] for row in rows],
    )


def embed(texts: list[str], embedder: str) -> np.ndarray:
    """Mean of the last hidden states, (texts, dimensions)."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(embedder), AutoModel.from_pretrained(embedder).eval()
    means = []
    for text in tqdm(texts, desc="embedding"):
        inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            means.append(model(**inputs).last_hidden_state[0].mean(0).numpy())
    return np.stack(means)


def draw_wrong(data: Arguments, noise: str, generator: np.random.Generator) -> np.ndarray:
    """(pairs,) which labels go against gold."""
    count = len(data.better)
    kind, *rates = noise.split("_")
    shares = [int(rate) / 100 for rate in rates]
    if kind == "real":
        return np.array([not votes[generator.integers(len(votes))] for votes in data.votes])
    if kind == "uniform":
        return generator.random(count) < shares[0]
    if kind == "classes":
        return generator.random(count) < np.where(data.better < data.worse, *shares)
    if kind == "length":
        longer = data.lengths[data.better] - data.lengths[data.worse]
        return generator.random(count) < 0.9 / (1 + np.exp(3 * longer))
    names = generator.permutation(np.unique(data.topic))
    is_bad = np.isin(data.topic, names[: round(len(names) * (0.16 if kind == "topics" else 0.25))])
    return is_bad if kind == "topics" else generator.random(count) < np.where(is_bad, 0.7, 0.1)


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


def train(data: Arguments, pairs: np.ndarray, objective: str, noise: Noise, options: tuple[str, float, int]) -> Any:
    """Scores (arguments,) of a head trained on (pairs, 2) of chosen and rejected arguments."""
    kind, weight_decay, seed = options
    torch.manual_seed(seed)
    embeddings = torch.from_numpy(data.embeddings)
    head = Head(embeddings.shape[1], kind)
    optimiser = torch.optim.AdamW(head.parameters(), LEARNING_RATE, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    verdict = noise.verdict()
    chosen, rejected = (embeddings[side] for side in pairs.T)
    for epoch in range(EPOCHS):
        mass = mass_schedule(epoch, WARMUP_EPOCHS, RAMP_EPOCHS, noise.rate)
        for rows in torch.randperm(len(pairs), generator=generator).split(BATCH):
            margins = head(chosen[rows]) - head(rejected[rows])
            doubt = torch.from_numpy(verdict.doubt)[rows].float() if verdict else torch.zeros(len(rows))
            believed = torch.from_numpy(verdict.believed)[rows] if verdict else torch.ones(len(rows), dtype=torch.bool)
            oriented = orient_batch(chosen[rows] - rejected[rows], margins, generator)
            batch = RewardBatch(*oriented, mass, noise.rate, doubt, believed, TRANSPORT)
            optimiser.zero_grad()
            OBJECTIVES[objective](batch)[0].backward()
            optimiser.step()
    with torch.inference_mode():
        return head(embeddings).numpy()


def run_cell(
    data: Arguments, noise: str, fold: int, seed: int, heads: list[str], decays: list[float]
) -> dict[str, Any]:
    """All objectives on one fold with one draw of the noise: accuracy and AUROC on gold, detection beside them."""
    generator = np.random.default_rng([seed, fold])
    debates = np.random.default_rng(0).permutation(data.debate.max() + 1) % FOLDS
    wrong = draw_wrong(data, noise, generator)
    is_test = debates[data.debate] == fold
    sides = np.stack([np.where(wrong, data.worse, data.better), np.where(wrong, data.better, data.worse)], 1)
    pairs, topics, flipped = sides[~is_test], data.topic[~is_test].tolist(), wrong[~is_test]
    rate = min(0.49, float(flipped.mean()))
    differences = data.embeddings[pairs[:, 0]] - data.embeddings[pairs[:, 1]]
    trusts = {
        "": trust_labels(differences, pairs, rate, seed),
        " by topic": trust_labels(differences, pairs, rate, seed, topics),
    }
    gold = np.stack([data.better, data.worse], 1)[is_test]
    longer = (data.lengths[gold[:, 0]] > data.lengths[gold[:, 1]]).mean()
    cell: dict[str, Any] = {"rate": rate, "rows": {"length only": {"accuracy": float(longer)}}}
    for name, trust in trusts.items():
        cell[f"detection{name}"] = float(roc_auc_score(flipped, 1 - trust.right))
    for kind in heads:
        for objective in OBJECTIVES:
            for name, trust in trusts.items() if objective in JUDGED else [("", None)]:
                for decay in decays:
                    known = Noise(None, rate, None, trust)
                    scores = train(data, pairs, objective, known, (kind, decay, seed))
                    margins = scores[gold[:, 0]] - scores[gold[:, 1]]
                    both = np.concatenate([margins, -margins])
                    cell["rows"][f"{kind} {decay:g} {objective}{name}"] = {
                        "accuracy": float((margins > 0).mean()),
                        "auroc": float(roc_auc_score(np.repeat([1, 0], len(margins)), both)),
                    }
    return cell


def show(cells: list[dict[str, Any]], reference: str) -> None:
    """Accuracy in percent, its paired difference to the reference with standard error, and Holm's p-value."""
    names = list(cells[0]["rows"])
    accuracy = {name: np.array([100 * cell["rows"][name]["accuracy"] for cell in cells]) for name in names}
    tests = {n: ttest_rel(v, accuracy[reference]).pvalue for n, v in accuracy.items() if n != reference}
    adjusted, worst = {}, 0.0
    for rank, name in enumerate(sorted(tests, key=lambda one: tests[one])):
        worst = max(worst, min(1.0, tests[name] * (len(tests) - rank)))
        adjusted[name] = worst
    print("| row | accuracy | difference | standard error | p (Holm) |\n|---|---|---|---|---|")
    for name, values in accuracy.items():
        difference = values - accuracy[reference]
        error = difference.std(ddof=1) / len(difference) ** 0.5
        print(
            f"| {name} | {values.mean():.1f} | {difference.mean():+.1f} | {error:.1f} | {adjusted.get(name, 1):.3f} |"
        )


def main() -> None:
    """Run what is missing and print a table per kind of noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--embedder", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--noise", nargs="+", choices=NOISES, default=list(NOISES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--heads", nargs="+", choices=("mlp", "linear"), default=["mlp", "linear"])
    parser.add_argument("--weight-decay", type=float, nargs="+", default=[0.0, 1.0])
    options = parser.parse_args()
    data = load(options.pairs, options.embedder, options.folder / "embeddings.npy")
    for noise in options.noise:
        cells = []
        for seed, fold in tqdm([(seed, fold) for seed in options.seeds for fold in range(FOLDS)], desc=noise):
            path = options.folder / f"{noise}-{seed}-{fold}.json"
            if not path.exists():
                cell = run_cell(data, noise, fold, seed, options.heads, options.weight_decay)
                path.write_text(json.dumps(cell, indent=1), encoding="utf-8")
            cells.append(json.loads(path.read_text(encoding="utf-8")))
        detection = {k: np.mean([cell[k] for cell in cells]).round(3) for k in cells[0] if k.startswith("detection")}
        print(f"\n{noise}: {np.mean([cell['rate'] for cell in cells]):.3f} of the labels wrong; {detection}\n")
        show(cells, f"{options.heads[0]} {options.weight_decay[0]:g} bradley_terry")


if __name__ == "__main__":
    main()
