"""Where rows come from: a local file or a hub dataset, with its columns renamed to the canonical ones."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

from rlhf.data.files import Records, dataset_rows, read_file
from rlhf.data.formats import Row, with_id
from rlhf.data.shapes import SHAPES
from rlhf.data.wording import in_form, with_system
from rlhf.errors import UserError, brief, first_line
from rlhf.params import FileSource, HubSource, VoteMethod

logger = logging.getLogger(__name__)

Kind = Literal["sft", "preferences", "ratings", "prompts"]
Votes = Literal["keep"] | VoteMethod
REQUIRED: dict[str, tuple[str, ...]] = {
    "sft": ("prompt", "completion"),
    "preferences": ("prompt", "chosen", "rejected"),
    "ratings": ("prompt", "completion"),
    "prompts": ("prompt",),
}
"""The texts that a row of each kind must have."""
REQUIRED_NUMBERS: dict[str, tuple[str, ...]] = {"ratings": ("score",)}
"""The numbers that it must have besides."""


@dataclass(frozen=True)
class Rows:
    """Rows that every loop makes anew, so that they need not fit into memory; `size` is their number where known."""

    make: Callable[[], Iterator[Row]]
    size: int | None = None

    def __iter__(self) -> Iterator[Row]:
        return self.make()


@dataclass(frozen=True)
class Treatment:
    """What is done to rows of any source: how votes are counted, the system turn, the form of demonstrations."""

    votes: Votes = "keep"
    system: str | None = None
    form: str | None = None


AS_THEY_ARE = Treatment()


def load_source(source: FileSource | HubSource, kind: Kind, root: Path, treatment: Treatment = AS_THEY_ARE) -> Rows:
    """The rows of a source in canonical form, each with its computed `id` first.

    Paths are relative to `root`. An `id` of the file's own is kept as `source_id`. Rows with nulls or wrong
    types pass: the validate stage sets them aside one by one. The source is read once before this returns, to know all
    of its columns, and again by every loop; where `treatment` makes one row of several votes, all rows are held in
    memory.
    Raises UserError for a source that cannot be read or lacks a column, and for an explicit id that stands twice.
    """
    shown = source.path if isinstance(source, FileSource) else f"hub dataset {source.name}"
    path = root / source.path if isinstance(source, FileSource) else None
    records = _load_hub(source) if isinstance(source, HubSource) else read_file(root / source.path, shown)
    found = _columns(_unrepeated(records))
    _require_mapped(found, source.columns, shown, kind)

    def shaped() -> Iterator[Row]:
        renamed = (_rename(row, source.columns) for _, row in records)
        rows = SHAPES[source.shape](renamed, path, shown)
        if treatment.form and kind == "sft":
            rows = in_form(rows, treatment.form)
        return with_system(rows, treatment.system, shown) if treatment.system else rows

    if source.shape == "canonical":
        found = list(_rename(dict.fromkeys(found), source.columns))
    else:
        found = _columns(islice(shaped(), 1))
    _require_columns(found, REQUIRED[kind] + REQUIRED_NUMBERS.get(kind, ()), shown, kind)
    votes = treatment.votes if kind == "preferences" else "keep"
    voted = shaped if votes == "keep" else _count_votes(shaped, votes, shown)
    chosen = voted if source.limit is None else _spread(voted, source.limit)
    return Rows(lambda: (with_id(_keep_source_id(row)) for row in chosen()))


def whole_file(path: Path, shape: str = "canonical", columns: Mapping[str, str] | None = None) -> FileSource:
    """The source that reads every row of a file."""
    return FileSource(
        kind="file", path=str(path), shape=cast(Any, shape), columns=dict(columns or {}), test_share=0.0, limit=None
    )


def _load_hub(source: HubSource) -> Records:
    try:
        import datasets
        import httpx
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise UserError(
            f"hub dataset {source.name}: the package {error.name} is not installed; install alignflow's requirements"
        ) from None
    # An id has one slash: what follows a second one is a folder of the dataset.
    parts = source.name.split("/")
    folder: dict[str, Any] = {"data_dir": "/".join(parts[2:])} if parts[2:] else {}
    try:
        dataset: Any = datasets.load_dataset(
            "/".join(parts[:2]), source.config, split=source.split, revision=source.revision, **folder
        )
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
    shown = f"hub dataset {source.name}, split {source.split},"
    return Records(shown, "row", lambda: dataset_rows(dataset, f"hub dataset {source.name}"))


def _columns(rows: Iterable[Row]) -> list[str]:
    """Every column's name, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _unrepeated(records: Records) -> Iterator[Row]:
    """The rows; raises UserError at the second row with one explicit id."""
    first_places: dict[bytes, int] = {}
    for place, row in records:
        if row.get("id") is not None:
            # Eight bytes instead of the id itself, of which there may be millions.
            key = blake2b(json.dumps(row["id"], sort_keys=True).encode(), digest_size=8).digest()
            if key in first_places:
                raise UserError(
                    f"{records.shown}: id {brief(repr(row['id']))} stands on {records.unit} {first_places[key]} and "
                    f"on {records.unit} {place}; give every row its own id or drop the column"
                )
            first_places[key] = place
        yield row


def _require_mapped(found: list[str], columns: dict[str, str], shown: str, kind: str) -> None:
    for name, theirs in columns.items():
        if theirs not in found:
            near = difflib.get_close_matches(theirs, found, n=1, cutoff=0.0)
            raise UserError(
                f"{shown} has no column {theirs!r} for {name!r} (found: {_listed(found)}); "
                f"did you mean {brief(near[0]) if near else ''!r} in prepare.data.{kind}.columns?"
            )


def _listed(names: list[str], most: int = 12) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(brief(name, 20) for name in names[:most]) + more or "none"


def _rename(row: Row, columns: dict[str, str]) -> Row:
    """Canonical names in place of the file's; a column that would be hidden by one moves to `source_<name>`."""
    moved = set(columns.values())
    return {name: row.get(theirs) for name, theirs in columns.items()} | {
        (f"source_{name}" if name in columns else name): value for name, value in row.items() if name not in moved
    }


def _require_columns(found: list[str], required: tuple[str, ...], shown: str, kind: str) -> None:
    for name in required:
        if name not in found:
            others = [column for column in found if column not in required]
            near = difflib.get_close_matches(name, others, n=1, cutoff=0.0)
            hint = f"{{{name}: {brief(near[0])}}}" if near else "it"
            raise UserError(
                f"{shown} has no column {name!r}, which {kind} rows need (found: {_listed(found)}); "
                f"add it, or map one with prepare.data.{kind}.columns, such as {hint}"
            )


def _count_votes(rows: Callable[[], Iterator[Row]], method: VoteMethod, shown: str) -> Callable[[], Iterator[Row]]:
    """One row in place of several annotators' votes on the same pair."""
    from rlhf.data.annotators import aggregate_votes

    made, figures = aggregate_votes(rows(), method)
    logger.info(
        "%s: one row for each of %d pairs with several votes, %d ties", shown, figures["pairs"], figures["ties"]
    )
    return lambda: iter(made)


def _spread(rows: Callable[[], Iterator[Row]], limit: int) -> Callable[[], Iterator[Row]]:
    """At most `limit` of the rows, evenly spread, because files are often sorted by topic."""
    count = sum(1 for _ in rows())
    if limit >= count:
        return rows
    chosen = {number * count // limit for number in range(limit)}
    return lambda: (row for number, row in enumerate(rows()) if number in chosen)


def _keep_source_id(row: Row) -> Row:
    """The row with its own id as `source_id`; a file that alignflow wrote keeps the one it has."""
    rest = {name: value for name, value in row.items() if name != "id"}
    return rest if row.get("id") is None or "source_id" in row else {**rest, "source_id": row["id"]}
