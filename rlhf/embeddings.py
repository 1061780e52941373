"""Frozen embeddings of every answer: written once by the stage embed, read row by row from the disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.formats import SPLITS, Row, training_rows, write_rows
from rlhf.encoding import read_answer
from rlhf.errors import UserError
from rlhf.ledger import Ledger, Limit, Reading
from rlhf.models import load_fresh_scorer, load_tokenizer, on_device
from rlhf.params import EmbedParams

if TYPE_CHECKING:
    import numpy as np

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


def embed_answers(section: EmbedParams, files: EmbedFiles, ledger: Ledger) -> dict[str, Any]:
    """Write the last token's state of every distinct answer, and which of them belong to which row.

    `answers.npy` is (answers, dimensions) in float32; `KIND/SPLIT.jsonl` names per row the places of its answers. A
    row that `ledger` does not admit, as an answer is longer than `section.max_length` tokens or than the model's
    context, is left out of it, and thereby of the reward model's training. Returns the metrics.
    Raises UserError as `Ledger.admit`, and where nothing is left of a split.
    """
    tokenizer: Any = load_tokenizer(files.model)
    model: Any = load_fresh_scorer(files.model, tokenizer.pad_token_id, section)
    tokens = min(section.max_length, getattr(model.config, "max_position_embeddings", None) or section.max_length)
    limit = Limit(tokens, f"embed.max_length or the model's context allows {tokens}")
    known: dict[tuple[int, ...], int] = {}
    for kind, columns in ANSWERS.items():
        rows = {split: training_rows(files.rows / kind / f"{split}.jsonl") for split in SPLITS}
        for split, listed in rows.items():
            readings = (read_answer(tokenizer, row, *columns) for row in listed)
            kept = ledger.admit(f"{kind}/{split}", readings, limit, tokenizer) if any(rows.values()) else []
            write_rows(
                files.embeddings / kind / f"{split}.jsonl", [_number_answers(reading, known) for reading in kept]
            )
            if any(rows.values()):
                _check_some_left(files.rows / kind / f"{split}.jsonl", len(listed), len(kept), tokens)
    _write_vectors(model, [list(ids) for ids in known], section.batch_size, files.embeddings / _VECTORS)
    figures = ledger.write(files.report)
    return {"ledger": figures, "answers": len(known), "dimensions": model.score.in_features}


def _number_answers(reading: Reading, known: dict[tuple[int, ...], int]) -> Row:
    """The row's id and the places of its answers; answers not yet `known` get the next ones."""
    return {"id": reading.row, "answers": [known.setdefault(tuple(ids), len(known)) for ids in reading.sequences]}


def _check_some_left(path: Path, count: int, kept: int, max_length: int) -> None:
    if not kept:
        raise UserError(
            f"{path} has no row for the reward model: {count} rows, {count} of them longer than {max_length} tokens "
            "(embed.max_length or the model's context); raise it, or give more data (or a larger test_share)"
        )


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


def load_vectors(folder: Path) -> np.ndarray:
    """(answers, dimensions), read from the disk where it is touched."""
    import numpy as np

    return np.load(folder / _VECTORS, mmap_mode="r")


def load_places(folder: Path, kind: str, split: str) -> dict[str, list[int]]:
    """The places of each row's answers among the vectors, by the row's id; rows that were too long are missing."""
    with (folder / kind / f"{split}.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {row["id"]: row["answers"] for row in rows}
