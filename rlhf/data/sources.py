"""Where rows come from: a local file or a hub dataset, with its columns renamed to the canonical ones."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from rlhf.data.files import Records, plain_rows, read_file
from rlhf.data.formats import Row, with_ids
from rlhf.data.shapes import SHAPES
from rlhf.errors import UserError, first_line
from rlhf.params import FileSource, HubSource

Kind = Literal["sft", "preferences", "ratings", "prompts"]
REQUIRED: dict[str, tuple[str, ...]] = {
    "sft": ("prompt", "completion"),
    "preferences": ("prompt", "chosen", "rejected"),
    "ratings": ("prompt", "completion"),
    "prompts": ("prompt",),
}
"""The texts that a row of each kind must have."""
REQUIRED_NUMBERS: dict[str, tuple[str, ...]] = {"ratings": ("score",)}
"""The numbers that it must have besides."""


def load_source(source: FileSource | HubSource, kind: Kind, root: Path) -> list[Row]:
    """The rows of a source in canonical form, each with its computed `id` first.

    Paths are relative to `root`. An `id` of the file's own is kept as `source_id`. Rows with nulls or wrong
    types pass: the validate stage sets them aside one by one.
    Raises UserError for a source that cannot be read or lacks a column, and for an explicit id that stands twice.
    """
    shown = source.path if isinstance(source, FileSource) else f"hub dataset {source.name}"
    path = root / source.path if isinstance(source, FileSource) else None
    records = _load_hub(source) if isinstance(source, HubSource) else read_file(root / source.path, shown)
    rows = _rename(records.rows, source.columns, shown, kind)
    _refuse_repeated_ids(rows, records, shown)
    rows = list(SHAPES[source.shape](rows, path, shown))
    _require_columns(rows, REQUIRED[kind] + REQUIRED_NUMBERS.get(kind, ()), shown, kind)
    return with_ids(_keep_source_id(row) for row in _spread(rows, source.limit))


def _load_hub(source: HubSource) -> Records:
    try:
        import datasets
        import httpx
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise UserError(
            f"hub dataset {source.name}: the package {error.name} is not installed; install alignflow's requirements"
        ) from None
    try:
        dataset = datasets.load_dataset(source.name, source.config, split=source.split, revision=source.revision)
    except (OSError, httpx.HTTPError, DatasetsError) as error:
        reason = first_line(error)
        raise UserError(
            f"hub dataset {source.name} (revision {source.revision}) cannot be fetched ({reason}); "
            "check the name and the network, or name a local file, which works offline"
        ) from None
    except ValueError as error:
        raise UserError(
            f"hub dataset {source.name} does not fit ({first_line(error)}); "
            f"mend config {source.config!r} or split {source.split!r}"
        ) from None
    rows = plain_rows(dataset.with_format(None).to_list(), f"hub dataset {source.name}")
    if not rows:
        raise UserError(f"hub dataset {source.name}, split {source.split}, is empty; name another split")
    return Records(rows, list(range(1, len(rows) + 1)), "row")


def _rename(rows: list[Row], columns: dict[str, str], shown: str, kind: str) -> list[Row]:
    """Canonical names in place of the file's; a column that would be hidden by one moves to `source_<name>`."""
    found = _columns(rows)
    for name, theirs in columns.items():
        if theirs not in found:
            near = difflib.get_close_matches(theirs, found, n=1, cutoff=0.0)
            raise UserError(
                f"{shown} has no column {theirs!r} for {name!r} (found: {', '.join(found)}); "
                f"did you mean {near[0] if near else ''!r} in prepare.data.{kind}.columns?"
            )
    moved = set(columns.values())

    def own_name(name: str) -> str:
        return f"source_{name}" if name in columns else name

    return [
        {name: row.get(theirs) for name, theirs in columns.items()}
        | {own_name(name): value for name, value in row.items() if name not in moved}
        for row in rows
    ]


def _columns(rows: Iterable[Row]) -> list[str]:
    """Every column's name, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _refuse_repeated_ids(rows: list[Row], records: Records, shown: str) -> None:
    first_places: dict[str, int] = {}
    for row, place in zip(rows, records.places, strict=True):
        if row.get("id") is None:
            continue
        key = json.dumps(row["id"], sort_keys=True)
        if key in first_places:
            raise UserError(
                f"{shown}: id {row['id']!r} stands on {records.unit} {first_places[key]} and "
                f"on {records.unit} {place}; give every row its own id or drop the column"
            )
        first_places[key] = place


def _require_columns(rows: list[Row], required: tuple[str, ...], shown: str, kind: str) -> None:
    found = _columns(rows)
    for name in required:
        if name not in found:
            others = [column for column in found if column not in required]
            near = difflib.get_close_matches(name, others, n=1, cutoff=0.0)
            hint = f"{{{name}: {near[0]}}}" if near else "it"
            raise UserError(
                f"{shown} has no column {name!r}, which {kind} rows need (found: {', '.join(found) or 'none'}); "
                f"add it, or map one with prepare.data.{kind}.columns, such as {hint}"
            )


def _spread(rows: list[Row], limit: int | None) -> list[Row]:
    """At most `limit` rows, evenly spread, because files are often sorted by topic."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index * len(rows) // limit] for index in range(limit)]


def _keep_source_id(row: Row) -> Row:
    """The row with its own id as `source_id`; a file that alignflow wrote keeps the one it has."""
    rest = {name: value for name, value in row.items() if name != "id"}
    return rest if row.get("id") is None or "source_id" in row else {**rest, "source_id": row["id"]}
