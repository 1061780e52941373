"""What benchmarks/reward_noise.py learns from: texts, which of two is the better one, and labels that go wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf.data.files import read_file
from rlhf.label_audit import embed_texts
from rlhf.surface import read_surface

NOISES = (
    "real",
    "uniform_20",
    "uniform_40",
    "classes_10_20",
    "classes_20_10",
    "classes_20_20",
    "length",
    "topics",
    "mixed",
)
DEBATES = 16
"""Sentences have none; so many parts of which each is held out as a whole stand for them."""
SENTENCES = 6000


@dataclass(frozen=True)
class Pairs:
    """Embedded texts (texts, dimensions) with what is seen of them (texts, marks); of each pair the better and worse.

    `debate` (pairs,) is held out as a whole; `topic` (pairs,) is that by which labels go wrong; `votes` says of each
    vote on a pair whether it is right, where there are any.
    """

    embeddings: np.ndarray
    surface: np.ndarray
    lengths: np.ndarray
    better: np.ndarray
    worse: np.ndarray
    debate: np.ndarray
    topic: np.ndarray
    votes: list[list[bool]]

    def label(self, wrong: np.ndarray) -> np.ndarray:
        """(pairs, 2) the text called the better and the other one, the wrong way round where `wrong` (pairs,)."""
        return np.stack([np.where(wrong, self.worse, self.better), np.where(wrong, self.better, self.worse)], 1)

    def tell_apart(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the first text of each of `pairs` (pairs, 2) beyond the second: embedding, and what is seen."""
        first, second = pairs.T
        return self.embeddings[first] - self.embeddings[second], self.surface[first] - self.surface[second]


def load_arguments(path: Path, embedder: str, cache: Path) -> Pairs:
    """UKPConvArg1: the pairs with a gold winner."""
    texts = {row["id"]: row["text"] for row in read_file(path.with_name("arguments.jsonl.gz"), "arguments").rows}
    place = {name: index for index, name in enumerate(texts)}
    rows = [row for row in read_file(path, "pairs").rows if row["gold"] in ("a1", "a2")]
    sides = [("arg1", "arg2") if row["gold"] == "a1" else ("arg2", "arg1") for row in rows]
    return Pairs(
        *_read(list(texts.values()), embedder, cache),
        np.array([place[row[one]] for row, (one, _) in zip(rows, sides, strict=True)]),
        np.array([place[row[other]] for row, (_, other) in zip(rows, sides, strict=True)]),
        np.unique([row["title"] for row in rows], return_inverse=True)[1],
        np.array([row["topic"] for row in rows]),
        [[vote["value"] == row["gold"] for vote in row["annotations"] if vote["value"] != "equal"] for row in rows],
    )


def load_sentences(path: Path, embedder: str, cache: Path) -> Pairs:
    """SST-2, a label and a sentence a line: positive is better than negative, and every sentence is in two pairs."""
    generator = np.random.default_rng(0)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    drawn = [lines[index].partition(" ") for index in generator.permutation(len(lines))[:SENTENCES]]
    is_good = np.array([label == "1" for label, *_ in drawn])
    part = generator.integers(0, DEBATES, len(drawn))
    better, worse, debates = [], [], []
    for debate in [*range(DEBATES)] * 2:
        good, bad = (
            generator.permutation(np.flatnonzero((part == debate) & (is_good == sign))) for sign in (True, False)
        )
        count = min(len(good), len(bad))
        better.append(good[:count])
        worse.append(bad[:count])
        debates.append(np.full(count, debate))
    debate = np.concatenate(debates)
    read = _read([sentence for *_, sentence in drawn], embedder, cache)
    return Pairs(*read, np.concatenate(better), np.concatenate(worse), debate, debate.astype(str), [])


def _read(texts: list[str], embedder: str, cache: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings and log length at mean 0 and deviation 1, the surface, and the log lengths alone."""
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.save(cache, embed_texts(texts, embedder))
    lengths = np.log([len(text) for text in texts])
    embeddings = np.hstack([np.load(cache), lengths[:, None]])
    return ((embeddings - embeddings.mean(0)) / embeddings.std(0)).astype(np.float32), read_surface(texts, 0), lengths


def draw_wrong(data: Pairs, noise: str, generator: np.random.Generator) -> np.ndarray:
    """(pairs,) which labels are wrong."""
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
