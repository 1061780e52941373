"""Turning rows of well-known data sets into canonical ones: a family of them in each module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from rlhf.data.formats import Row
from rlhf.data.shapes.arguments import argument_pairs, argument_prompts, argument_texts, argument_votes
from rlhf.data.shapes.converting import convert_rows
from rlhf.data.shapes.table import FORMS

Shape = Callable[[Iterable[Row], Path | None, str], Iterator[Row]]


def canonical(rows: Iterable[Row], _path: Path | None, _shown: str) -> Iterator[Row]:
    """Rows that are canonical already."""
    return iter(rows)


SHAPES: dict[str, Shape] = {
    "canonical": canonical,
    "argument_pairs": argument_pairs,
    "argument_votes": argument_votes,
    "argument_texts": argument_texts,
    "argument_prompts": argument_prompts,
    **{name: partial(convert_rows, name) for name in FORMS},
}
"""Functions of (rows, the file they come from, its name in messages), by the name in params."""
