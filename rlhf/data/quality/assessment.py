"""One more reading of the rows that are kept: what they are together, as a table of marks and as figures; no texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.data.annotators import Votes, describe_agreement
from rlhf.data.formats import SPLITS, Row, completion_text, row_id
from rlhf.data.measurements import hash_texts, in_batches
from rlhf.data.quality.answers import STYLE, holds, last_turn, make_plain, standardise
from rlhf.data.quality.contamination import MUCH, HeldOut
from rlhf.data.quality.cycles import find_cycles
from rlhf.data.quality.near_duplicates import find_minima, find_near_duplicates, sketch
from rlhf.data.quality.position import judge_position
from rlhf.data.quality.words import Words, hash_words
from rlhf.data.sources import REQUIRED, Rows

if TYPE_CHECKING:
    import pandas as pd

BATCH = 512
"""Rows read at a time."""
SHOWN_FIRST = "shown_first"
"""The optional column of preferences that says which answer the annotator saw first: `chosen` or `rejected`."""


@dataclass(frozen=True)
class Assessment:
    """A line per row looked at, with its `id`, and the figures of the kind."""

    table: pd.DataFrame
    figures: dict[str, Any]


def assess(kept: Mapping[str, Mapping[str, Rows]], most_rows: int | None) -> dict[str, Assessment]:
    """What the sound rows of every kind, by split, are together.

    Held-out prompts are looked for in the training texts of all kinds. Of a kind with more than `most_rows` rows about
    so many are looked at: all rows of prompts drawn by their hash, the same ones each time. Near duplicates and
    contamination are then found less often than they occur.

    Columns: `id`, `split`, `near_duplicates`, `contaminated` (null for training rows and short prompts); where
    there are answers `repeats_prompt`; for preferences `holds_other_answer`, `on_cycle`, `cyclic_share`, `first_wins`
    (whether the answer shown first was chosen) and `style_x` for every mark of style x (chosen - rejected, in standard
    deviations). `cyclic_share` and `first_wins` are null where unknown, and missing where that is so of all rows.
    """
    drawn = {kind: _draw(splits, most_rows) for kind, splits in kept.items()}
    held_out = {kind: HeldOut(map(_prompt_words, in_batches(splits["test"], BATCH))) for kind, splits in drawn.items()}
    read = {kind: _read(splits, kind, list(held_out.values())) for kind, splits in drawn.items()}
    return {kind: _combine(kind, own, held_out[kind].shares()) for kind, own in read.items()}


def _draw(splits: Mapping[str, Rows], most: int | None) -> Mapping[str, Rows]:
    """About `most` rows, whole prompts."""
    if most is None:
        return splits
    count = sum(sum(1 for _ in rows) if rows.size is None else rows.size for rows in splits.values())
    if count <= most:
        return splits
    limit = int(most / count * 2**64)

    def fewer(rows: Rows) -> Rows:
        return Rows(lambda: (row for row in rows if hash_texts([completion_text(row["prompt"])])[0] < limit))

    return {split: fewer(rows) for split, rows in splits.items()}


def _prompt_words(batch: list[Row]) -> Words:
    return hash_words([completion_text(row["prompt"]) for row in batch])


# a batch ------------------------------------------------------------------------------------------


def _read(splits: Mapping[str, Rows], kind: str, held_out: list[HeldOut]) -> dict[str, np.ndarray]:
    """What every row tells by itself, by name; marks in `held_out` what the training rows hold."""
    parts = [
        _read_batch(batch, split, kind, held_out if split == "train" else [])
        for split in SPLITS
        for batch in in_batches(splits[split], BATCH)
    ]
    parts = parts or [_read_batch([], "train", kind, [])]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _read_batch(batch: list[Row], split: str, kind: str, held_out: list[HeldOut]) -> dict[str, np.ndarray]:
    prompt, *names = REQUIRED[kind]
    texts = {name: [completion_text(row[name]) for row in batch] for name in (prompt, *names)}
    words = {name: hash_words(own) for name, own in texts.items()}
    for prompts in held_out:
        for own in words.values():
            prompts.mark(own)
    minima = [find_minima(own) for own in words.values()]
    sketches = [sketch(minima[0])] + ([sketch(np.minimum.reduce(minima[1:]))] if names else [])
    answers = (
        [sorted(own) for own in zip(*(texts[name] for name in names), strict=True)] if names else [[]] * len(batch)
    )
    contents = ["\0".join([own, *rest]) for own, rest in zip(texts[prompt], answers, strict=True)]
    read = {
        "id": np.array([str(row.get("id") or row_id(row)) for row in batch], dtype=object),
        "split": np.full(len(batch), SPLITS.index(split), dtype=np.int8),
        "sketches": np.stack(sketches, axis=1),
        "contents": hash_texts(contents),
    }
    if names:
        plain = [[make_plain(texts[name][place]) for name in names] for place in range(len(batch))]
        asked = [make_plain(last_turn(row[prompt])) for row in batch]
        read["repeats_prompt"] = _flags(
            any(holds(answer, own) for answer in own_answers) for own, own_answers in zip(asked, plain, strict=True)
        )
        if kind == "preferences":
            read["holds_other_answer"] = _flags(holds(one, other) or holds(other, one) for one, other in plain)
            read |= _read_pairs(batch, texts)
    return read


def _read_pairs(batch: list[Row], texts: Mapping[str, list[str]]) -> dict[str, np.ndarray]:
    pairs = list(zip(texts["chosen"], texts["rejected"], strict=True))
    first = [row.get(SHOWN_FIRST) for row in batch]
    read = {
        "first_wins": np.array(
            [{"chosen": 1.0, "rejected": 0.0}.get(str(own), np.nan) for own in first], dtype=np.float32
        ),
    }
    read |= {
        f"style_{name}": np.array([mark(one) - mark(other) for one, other in pairs], dtype=np.float32)
        for name, mark in STYLE.items()
    }
    read["chose_first"] = _flags(chosen < rejected for chosen, rejected in pairs)
    read["is_vote"] = _flags(row.get("annotator") is not None for row in batch)
    read["annotator"] = hash_texts(str(row.get("annotator")) for row in batch)
    return read | {f"{name}_key": hash_texts(text.strip() for text in own) for name, own in texts.items()}


def _flags(values: Iterable[bool]) -> np.ndarray:
    return np.fromiter(values, dtype=bool)


# a kind -------------------------------------------------------------------------------------------


def _combine(kind: str, read: dict[str, np.ndarray], seen: np.ndarray) -> Assessment:
    """The table and the figures of a kind from its rows' own columns and the seen shares of its held-out prompts."""
    import pandas as pd

    twins = find_near_duplicates(read["sketches"], read["contents"], read["split"])
    marks: dict[str, Any] = {"near_duplicates": twins >= 0, "contaminated": _contaminated(read["split"], seen)}
    judged = seen[~np.isnan(seen)]
    figures: dict[str, Any] = {
        "rows": len(twins),
        "near_duplicates": _share(twins >= 0),
        "near_duplicates_example": _ids(read, _first_pair(twins)),
        "contaminated": _share(judged >= MUCH),
        "contaminated_mean": float(judged.mean()) if len(judged) else None,
        "contamination_judged": len(judged),
    }
    if "repeats_prompt" in read:
        marks["repeats_prompt"] = read["repeats_prompt"]
        figures["repeats_prompt"] = _share(read["repeats_prompt"])
    if kind == "preferences":
        pair_marks, pair_figures = _combine_pairs(read)
        marks |= pair_marks
        figures |= pair_figures
    splits = np.array(SPLITS, dtype=object)[read["split"]]
    return Assessment(pd.DataFrame({"id": read["id"], "split": splits} | marks), figures)


def _contaminated(split: np.ndarray, seen: np.ndarray) -> np.ndarray:
    marks = np.full(len(split), None, dtype=object)
    marks[split == SPLITS.index("test")] = [None if np.isnan(share) else bool(share >= MUCH) for share in seen]
    return marks


def _combine_pairs(read: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Any]]:
    cycles = find_cycles(read["prompt_key"], read["chosen_key"], read["rejected_key"])
    marks: dict[str, Any] = {"holds_other_answer": read["holds_other_answer"], "on_cycle": cycles.shares > 0}
    figures: dict[str, Any] = {name: _share(own) for name, own in marks.items()}
    marks |= {f"style_{name}": standardise(read[f"style_{name}"].astype(float)) for name in STYLE}
    judged = cycles.shares[~np.isnan(cycles.shares)]
    if len(judged):
        marks["cyclic_share"] = cycles.shares
    figures["cyclic_share"] = _share(judged)
    figures["cycles"] = {
        "triples": cycles.triples,
        "cyclic": cycles.cyclic,
        "left_out": cycles.left_out,
        "example": _ids(read, cycles.example),
    }
    figures["style"] = {name: _share(marks[f"style_{name}"]) for name in STYLE}
    if votes := _votes(read):
        figures["agreement"] = describe_agreement(votes)
    known = read["first_wins"][~np.isnan(read["first_wins"])]
    if first_shown := judge_position(known > 0):
        marks["first_wins"] = read["first_wins"]
        figures["position"] = asdict(first_shown)
    return marks, figures


def _votes(read: dict[str, np.ndarray]) -> Votes | None:
    """The verdicts of different annotators on the same two answers; None where no pair has two."""
    places = np.flatnonzero(read["is_vote"])
    ballots = np.stack([read["contents"][places], read["annotator"][places]], axis=1)
    places = places[np.sort(np.unique(ballots, axis=0, return_index=True)[1])]  # the first of each on a pair
    pairs, counts = np.unique(read["contents"][places], return_inverse=True, return_counts=True)[1:]
    places = places[counts[pairs] > 1]
    if not len(places):
        return None
    numbered = [np.unique(read[name][places], return_inverse=True)[1] for name in ("contents", "annotator")]
    return Votes(numbered[0], numbered[1], read["chose_first"][places].astype(int))


def _first_pair(twins: np.ndarray) -> list[int]:
    found = np.flatnonzero(twins >= 0)[:1]
    return [int(twins[found[0]]), int(found[0])] if len(found) else []


def _ids(read: dict[str, np.ndarray], rows: list[int]) -> list[str]:
    return [read["id"][row] for row in rows]


def _share(marks: np.ndarray) -> float | None:
    """The mean, None where there is nothing to take it of."""
    return float(marks.mean()) if len(marks) else None
