"""The rows the reward model learns from and is measured by, as the params name them: read, encoded, labelled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf import audit
from rlhf.data.formats import training_rows
from rlhf.embeddings import ANSWERS, load_places, load_vectors
from rlhf.errors import UserError
from rlhf.examples import Examples, encode_sides
from rlhf.models import load_tokenizer
from rlhf.params import RewardParams
from rlhf.ratings import Threshold, find_threshold, read_scores


@dataclass(frozen=True)
class RewardFiles:
    """What the stage reads and writes.

    The SFT model, the model whose embeddings are cached and their folder, training and held-out rows; the reward model,
    the judge and the report's folder.
    """

    start: Path
    embedder: Path | str
    embeddings: Path
    train: Path
    test: Path
    model: Path
    judge: Path
    report: Path


@dataclass(frozen=True)
class Source:
    """How rows become examples: the model that reads them, all embeddings, and from where on a rating is good."""

    section: RewardParams
    files: RewardFiles
    kind: str
    start: Path | str
    tokenizer: Any
    vectors: np.ndarray
    threshold: Threshold | None

    def read(self, path: Path, split: str) -> Examples:
        """The rows that the stage embed kept; encoded unless the embeddings are all that is read."""
        places = load_places(self.files.embeddings, self.kind, split)
        listed = training_rows(path)
        rows = [row for row in listed if row["id"] in places]
        columns = () if self.section.frozen else ANSWERS[self.kind]
        ratings, threshold = self.section.ratings, self.threshold
        return Examples(
            [row["id"] for row in rows],
            [json.dumps(row["prompt"], ensure_ascii=False) for row in rows],
            np.array([places[row["id"]] for row in rows]),
            encode_sides(self.tokenizer, rows, columns),
            threshold.label(read_scores(ratings, rows)) if ratings and threshold else None,
            len(listed) - len(rows),
        )

    def read_flips(self, path: Path) -> dict[str, bool] | None:
        """Which labels are wrong, by the row's id; None where that is not known."""
        return audit.read_flips(path) if self.threshold is None else audit.read_rating_flips(path, self.threshold.label)


def kind_of(section: RewardParams) -> str:
    return "ratings" if section.ratings else "preferences"


def open_source(section: RewardParams, files: RewardFiles) -> Source:
    kind = kind_of(section)
    start = files.embedder if section.frozen else files.start
    threshold = None
    if section.ratings:
        kept = load_places(files.embeddings, kind, "train")
        rows = [row for row in training_rows(files.train) if row["id"] in kept]
        threshold = find_threshold(section.ratings, read_scores(section.ratings, rows))
    return Source(section, files, kind, start, load_tokenizer(start), load_vectors(files.embeddings), threshold)


def read_column(key: str, column: str, path: Path, train: Examples) -> list[Any]:
    """The values of the column that reward.`key` names, one per training row."""
    rows = {row["id"]: row for row in training_rows(path)}
    for name in train.ids:
        if rows[name].get(column) is None:
            raise UserError(
                f"{path}, row {name}: no {column!r}, which reward.{key} names; "
                f"its columns are {', '.join(rows[name])}; name one of them or set reward.{key} to null"
            )
    return [rows[name][column] for name in train.ids]


def read_leads(section: RewardParams, path: Path, train: Examples) -> np.ndarray | None:
    """(pairs,) by how much the chosen answer's reward should be ahead; None where reward.margin is null."""
    if section.margin is None:
        return None
    values = read_column("margin", section.margin, path, train)
    for name, value in zip(train.ids, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise UserError(
                f"{path}, row {name}: {section.margin} is {value!r}, no number; mend it or set reward.margin to null"
            )
    return np.array(values, dtype=float)
