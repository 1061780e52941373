"""What the tricks are tried on: prompts with a good and a bad answer, from whatever held-out rows there are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.audit import FLIPPED, TRUE_SCORE
from rlhf.data.formats import Row, read_rows
from rlhf.probe.tricks import find_language


@dataclass(frozen=True)
class Case:
    """A prompt and two answers to it, texts or messages; `language` is that of the sentences that tricks add."""

    prompt: Any
    good: Any
    bad: Any
    language: str


@dataclass(frozen=True)
class HeldOut:
    """The files of held-out rows that cases may come from; ratings only where the reward model learnt from them."""

    preferences: Path
    ratings: Path | None
    sft: Path


def read_cases(files: HeldOut) -> tuple[list[Case], str]:
    """Cases from the rows the reward model is measured by, else from demonstrations, and where they come from.

    Without any rows the list is empty.
    """
    sources: list[tuple[str, Path | None, Callable[[Sequence[Row]], list[Case]]]] = [
        ("preferences", None if files.ratings else files.preferences, cases_from_preferences),
        ("ratings", files.ratings, cases_from_ratings),
        ("sft", files.sft, cases_from_answers),
    ]
    for name, path, make in sources:
        if path and path.exists() and (cases := make(read_rows(path))):
            return cases, name
    return [], "nothing"


def cases_from_preferences(rows: Sequence[Row]) -> list[Case]:
    """A pair is a case; by the true order where a row says it, else by its label."""
    sides = [("rejected", "chosen") if row.get(FLIPPED) else ("chosen", "rejected") for row in rows]
    return [make_case(row["prompt"], row[good], row[bad]) for row, (good, bad) in zip(rows, sides, strict=True)]


def cases_from_ratings(rows: Sequence[Row]) -> list[Case]:
    """The best and the worst answer to each prompt; where no prompt has two, those rated above the mean.

    By the true rating where a row says it, else by its own.
    """
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(json.dumps(row["prompt"]), []).append(row)
    ordered = [sorted(group, key=_rating) for group in by_prompt.values()]
    pairs = [(group[-1], group[0]) for group in ordered if _rating(group[-1]) > _rating(group[0])]
    if pairs:
        return [make_case(good["prompt"], good["completion"], bad["completion"]) for good, bad in pairs]
    mean = sum(map(_rating, rows)) / max(1, len(rows))
    return cases_from_answers([row for row in rows if _rating(row) > mean])


def cases_from_answers(rows: Sequence[Row]) -> list[Case]:
    """Answers that are taken for good; the bad answer is the next one that differs and belongs to another prompt."""
    cases = []
    for place, row in enumerate(rows):
        following = (rows[(place + step) % len(rows)] for step in range(1, len(rows)))
        other = next((one for one in following if all(one[key] != row[key] for key in ("prompt", "completion"))), None)
        if other:
            cases.append(make_case(row["prompt"], row["completion"], other["completion"]))
    return cases


def make_case(prompt: Any, good: Any, bad: Any) -> Case:
    spoken = prompt if isinstance(prompt, str) else [message for message in prompt if message["role"] == "user"]
    return Case(prompt, good, bad, find_language(spoken, good))


def _rating(row: Row) -> float:
    return float(row.get(TRUE_SCORE, row["score"]))
