"""What a file holds: its columns, the shape they have, how long its texts are, and the params that would read it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from rlhf.data.files import read_file
from rlhf.data.formats import Row, completion_text
from rlhf.data.shapes import SHAPES
from rlhf.data.shapes.forms import is_messages
from rlhf.data.shapes.guessing import SAMPLE, Guess, first_values, guess_shapes
from rlhf.data.sources import REQUIRED, REQUIRED_NUMBERS, Kind, load_source, whole_file
from rlhf.errors import UserError
from rlhf.params import FileSource, kind_of_shape

QUANTILES = {"least": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "most": 1.0}
SHOWN_ROWS, SHOWN_LETTERS = 5, 160
Table = list[dict[str, str]]


@dataclass(frozen=True)
class Inspection:
    """What `inspect_file` found; tables are lists of rows, each with the same headings."""

    guess: Guess
    others: list[Guess]
    counts: dict[str, int]
    columns: Table
    lengths: Table
    rows: Table
    snippet: str


def inspect_file(
    path: Path, shape: str | None, kind: str | None, count_tokens: Callable[[str], int] | None
) -> Inspection:
    """Look into a file as `shape` and `kind` say, or as its columns and values suggest where they are None.

    Raises UserError for a file that cannot be read, for a shape or kind that does not exist or do not go together,
    and where nothing fits.
    """
    shown = str(path)
    raw = read_file(path, shown).rows
    fitting = guess_shapes(raw[:SAMPLE])
    guess = _choose(fitting, _known(shape, SHAPES, "shape"), _known(kind, REQUIRED, "kind"), raw, shown)
    source = whole_file(path, guess.shape, guess.columns)
    rows = list(load_source(source, cast(Kind, guess.kind), Path()))
    texts = _texts(rows)
    lengths = _lengths(texts, len, "characters")
    if count_tokens:
        lengths += _lengths(texts, count_tokens, "tokens")
    return Inspection(
        guess,
        [other for other in fitting if other != guess],
        _counts(raw, rows, guess.kind),
        _columns(raw),
        lengths,
        [_cut(row) for row in rows[:SHOWN_ROWS]],
        _snippet(source, guess.kind),
    )


def _known(name: str | None, names: Iterable[str], what: str) -> str | None:
    if name is not None and name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
        raise UserError(f"there is no {what} {name!r}; did you mean {near[0]}? docs/data.md lists them all")
    return name


def _choose(fitting: list[Guess], shape: str | None, kind: str | None, raw: list[Row], shown: str) -> Guess:
    """The guess that fits the wishes best, or what they say where none does."""
    given = kind_of_shape(shape) if shape else None
    if given and kind and given != kind:
        raise UserError(f"shape {shape} gives {given}, not {kind}; leave out --kind or name another shape")
    wanted = [guess for guess in fitting if shape in (None, guess.shape) and (given or kind) in (None, guess.kind)]
    if wanted:
        return wanted[0]
    if shape and (given or kind):
        return Guess(shape, str(given or kind), {})
    found = ", ".join(first_values(raw))
    if shape:
        raise UserError(f"shape {shape} gives rows of any kind and {shown} does not say which; name it with --kind")
    if kind and fitting:
        others = ", ".join(dict.fromkeys(f"{guess.shape} ({guess.kind})" for guess in fitting))
        raise UserError(f"{shown} looks like {others}, not like {kind} (columns {found}); name a shape with --shape")
    raise UserError(
        f"{shown} has no shape that is known (columns {found}); name a shape with --shape, or rename its columns with "
        f"shape canonical and prepare.data.<kind>.columns to those in docs/data.md"
    )


# tables -------------------------------------------------------------------------------------------


def _counts(raw: list[Row], rows: list[Row], kind: str) -> dict[str, int]:
    needed = (*REQUIRED[kind], *REQUIRED_NUMBERS.get(kind, ()))
    return {
        "rows read": len(raw),
        "rows made": len(rows),
        "rows lacking something": sum(any(row.get(name) is None for name in needed) for row in rows),
        "prompts": len({json.dumps(row.get("prompt"), sort_keys=True) for row in rows}),
    }


def _columns(raw: list[Row]) -> Table:
    """The file's own columns: what kind of value stands there first, and in how many rows there is none."""
    return [
        {
            "column": name,
            "holds": _describe(value),
            "missing": str(sum(row.get(name) is None for row in raw)),
            "first value": _shorten(value),
        }
        for name, value in first_values(raw).items()
    ]


def _describe(value: Any) -> str:
    if is_messages(value):
        return "messages"
    names = {str: "text", bool: "true or false", int: "number", float: "number", list: "list", dict: "object"}
    return names.get(type(value), "nothing")


def _texts(rows: list[Row]) -> dict[str, list[str]]:
    """The words of every column of texts or messages, but for the id."""
    texts: dict[str, list[str]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "id" and (isinstance(value, str) or is_messages(value)):
                texts.setdefault(name, []).append(completion_text(value) if _is_said(value) else _shorten(value))
    return texts


def _is_said(value: Any) -> bool:
    return isinstance(value, str) or all(isinstance(turn.get("content"), str) for turn in value)


def _lengths(texts: Mapping[str, list[str]], measure: Callable[[str], int], unit: str) -> Table:
    table: Table = []
    for name, said in texts.items():
        lengths = [measure(text) for text in said]
        quantiles = np.quantile(lengths, list(QUANTILES.values()), method="inverted_cdf")
        figures = {label: str(int(value)) for label, value in zip(QUANTILES, quantiles, strict=True)}
        table.append({"column": name, "unit": unit, **figures})
    return table


def _cut(row: Row) -> dict[str, str]:
    return {name: _shorten(value) for name, value in row.items() if name != "id"}


def _shorten(value: Any) -> str:
    """One line of at most so many letters; of messages, who said what."""
    if is_messages(value):
        said = (f"[{turn.get('role', turn.get('from'))}] {turn.get('content', turn.get('value'))}" for turn in value)
        text = " ".join(said)
    else:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_LETTERS else line[: SHOWN_LETTERS - 1] + "…"


def _snippet(source: FileSource, kind: str) -> str:
    """The lines of params.yaml that read the file so, a tenth held out; JSON texts and objects are YAML too."""
    lines = ["prepare:", "  data:", f"    {kind}:"]
    for name, value in (source.model_dump() | {"test_share": 0.1}).items():
        plain = value if name in ("kind", "shape") else json.dumps(value, ensure_ascii=False)
        lines.append(f"      {name}: {plain}")
    return "\n".join(lines)
