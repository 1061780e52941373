"""Rows of a shape into canonical ones, one by one."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from rlhf.data.formats import Row, row_id
from rlhf.data.shapes.forms import Form, tell
from rlhf.data.shapes.guessing import SAMPLE, first_values, guess_shapes
from rlhf.data.shapes.table import FORMS
from rlhf.errors import UserError
from rlhf.params import kind_of_shape


def convert_rows(shape: str, rows: Iterable[Row], _path: Path | None, shown: str) -> Iterator[Row]:
    """The canonical rows of a shape, as they come.

    The columns that the shape reads go; others stay, under `source_<name>` where a canonical one has their name. A row
    of which something cannot be used keeps all its columns, so that its quarantine shows what there was.
    Raises UserError where the first rows lack a column of the shape, or a later one has none of them.
    """
    form = FORMS[shape]
    remaining = iter(rows)
    sample = list(itertools.islice(remaining, SAMPLE))
    _refuse_another_shape(shape, sample, shown)
    seen: set[str] = set()
    read = without = repeated = 0
    for row in itertools.chain(sample, remaining):
        read += 1
        if not any(name in row for name in form.columns):
            raise _wrong_shape(shape, [row], list(form.columns), f"{shown}, its row {read}")
        made = list(form.convert(row))
        without += not made
        for one in made:
            if form.is_distinct and _is_repeat(one, seen):
                repeated += 1
                continue
            yield _with_rest(one, row, form)
    if without or repeated:
        tell(f"{shown}: {read} rows, {without} without a preference and {repeated} prompts seen before left out")


def _is_repeat(row: Row, seen: set[str]) -> bool:
    if row["prompt"] is None:
        return False
    key = row_id({"prompt": row["prompt"]})
    is_old = key in seen
    seen.add(key)
    return is_old


def _with_rest(made: Row, row: Row, form: Form) -> Row:
    is_whole = all(value is not None for value in made.values())
    spent = {*form.columns, *form.optional} if is_whole else set()
    rest = {name: value for name, value in row.items() if name not in spent}
    return made | {f"source_{name}" if name in made else name: value for name, value in rest.items()}


def _refuse_another_shape(shape: str, sample: list[Row], shown: str) -> None:
    found = first_values(sample)
    missing = [name for name in FORMS[shape].columns if name not in found]
    if sample and missing:
        raise _wrong_shape(shape, sample, missing, shown)


def _wrong_shape(shape: str, sample: list[Row], missing: list[str], shown: str) -> UserError:
    """What to say of rows that lack columns: which, what was found, and which shape fits or is nearest."""
    found = list(first_values(sample))
    kind = kind_of_shape(shape)
    key = f"prepare.data.{kind}"
    fitting = sorted(guess_shapes(sample), key=lambda guess: guess.kind != kind)
    if fitting:
        best = fitting[0]
        columns = f" and its columns to {json.dumps(dict(best.columns))}" if best.columns else ""
        remedy = f"it looks like {best.shape} ({best.kind}): set prepare.data.{best.kind}.shape to that{columns}"
    else:
        near = difflib.get_close_matches(missing[0], found, n=1, cutoff=0.0)
        remedy = f"name one in {key}.columns, such as {{{missing[0]}: {near[0] if near else '…'}}}, or another shape"
    return UserError(
        f"{shown} has not the shape {shape}: no column {', '.join(map(repr, missing))} "
        f"(found: {', '.join(found) or 'none'}); {remedy}"
    )
