"""Frozen embeddings of every answer: written once by the stage embed, read row by row from the disk."""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.formats import SPLITS, Row, training_rows, write_rows
from rlhf.encoding import encode_answer
from rlhf.errors import UserError
from rlhf.models import load_fresh_scorer, load_tokenizer, on_device
from rlhf.params import EmbedParams

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

ANSWERS: dict[str, tuple[str, ...]] = {"preferences": ("chosen", "rejected"), "ratings": ("completion",)}
"""The columns of each kind that hold answers."""
_VECTORS = "answers.npy"


@dataclass(frozen=True)
class EmbedFiles:
    """What the stage reads (a model, the folder with a folder of rows per kind) and writes."""

    model: Path | str
    rows: Path
    embeddings: Path
    report: Path


def embed_answers(section: EmbedParams, files: EmbedFiles) -> dict[str, int]:
    """Write the last token's state of every distinct answer, and which of them belong to which row.

    `answers.npy` is (answers, dimensions) in float32; `KIND/SPLIT.jsonl` names per row the places of its answers. A
    row with an answer longer than `section.max_length` tokens, or than the model's context, is left out of it, and
    thereby of the reward model's training. `lengths.csv` counts the answers by their tokens. Returns the metrics.
    Raises UserError where all rows of a split are too long.
    """
    tokenizer: Any = load_tokenizer(files.model)
    model: Any = load_fresh_scorer(files.model, tokenizer.pad_token_id, section)
    limit = min(section.max_length, getattr(model.config, "max_position_embeddings", None) or section.max_length)
    known: dict[tuple[int, ...], int] = {}
    lengths: Counter[int] = Counter()
    metrics: dict[str, int] = {}
    for kind, columns in ANSWERS.items():
        paths = [files.rows / kind / f"{split}.jsonl" for split in SPLITS]
        rows = [training_rows(path) for path in paths]
        for path, split, listed in zip(paths, SPLITS, rows, strict=True):
            encoded = [[tuple(encode_answer(tokenizer, row["prompt"], row[c])) for c in columns] for row in listed]
            lengths.update(len(ids) for answers in encoded for ids in answers)
            kept = _number_answers(listed, encoded, limit, known)
            if any(rows):
                _check_some_left(path, len(listed), len(kept), limit)
            write_rows(files.embeddings / kind / f"{split}.jsonl", kept)
            metrics |= {f"{kind}_{split}_rows": len(kept), f"{kind}_{split}_dropped_too_long": len(listed) - len(kept)}
    _write_vectors(model, [list(ids) for ids in known], section.batch_size, files.embeddings / _VECTORS)
    _write_lengths(files.report / "lengths.csv", lengths)
    return {**metrics, "answers": len(known), "dimensions": model.score.in_features}


def _number_answers(
    rows: list[Row], encoded: list[list[tuple[int, ...]]], max_length: int, known: dict[tuple[int, ...], int]
) -> list[Row]:
    """Each row that is short enough with the places of its answers; answers not yet `known` get the next ones."""
    return [
        {"id": row["id"], "answers": [known.setdefault(ids, len(known)) for ids in answers]}
        for row, answers in zip(rows, encoded, strict=True)
        if max(map(len, answers)) <= max_length
    ]


def _check_some_left(path: Path, count: int, kept: int, max_length: int) -> None:
    if not kept:
        raise UserError(
            f"{path} has no row for the reward model: {count} rows, {count} of them longer than {max_length} tokens "
            "(embed.max_length or the model's context); raise it, or give more data (or a larger test_share)"
        )
    if kept < count:
        logger.warning("%s: %d rows longer than %d tokens are left out", path.name, count - kept, max_length)


def _write_vectors(model: Any, sequences: list[list[int]], batch_size: int, path: Path) -> None:
    """Embed batch by batch into a file that lies on the disk."""
    import numpy as np

    from rlhf.examples import read_in_batches

    on_device(model)
    shape = (len(sequences), model.score.in_features)
    if not sequences:  # a file without content cannot be mapped into memory
        np.save(path, np.zeros(shape, dtype=np.float32))
        return
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    for places, _, embeddings in read_in_batches(model, sequences, batch_size):
        vectors[places] = embeddings
    vectors.flush()


def _write_lengths(path: Path, lengths: Counter[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["tokens", "answers"])
        writer.writerows(sorted(lengths.items()))


def load_vectors(folder: Path) -> np.ndarray:
    """(answers, dimensions), read from the disk where it is touched."""
    import numpy as np

    return np.load(folder / _VECTORS, mmap_mode="r")


def load_places(folder: Path, kind: str, split: str) -> dict[str, list[int]]:
    """The places of each row's answers among the vectors, by the row's id; rows that were too long are missing."""
    with (folder / kind / f"{split}.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {row["id"]: row["answers"] for row in rows}
