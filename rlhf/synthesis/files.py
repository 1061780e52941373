"""What synthesis reads and writes: rows of whatever shape, and a file that grows row by row."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from rlhf.data.files import read_file
from rlhf.data.formats import Row, row_line, without_truth
from rlhf.data.shapes.guessing import SAMPLE, guess_shapes
from rlhf.data.sources import Kind, load_source, whole_file
from rlhf.errors import UserError

logger = logging.getLogger(__name__)


def read_kind(path: Path, kind: Kind) -> list[Row]:
    """A file's rows of a kind, in the shape that its columns suggest, truth columns left out.

    Raises UserError where it cannot be read or nothing in it could be such rows.
    """
    sample = [row for _, row in islice(read_file(path, str(path)), SAMPLE)]
    fitting = [guess for guess in guess_shapes(sample) if guess.kind == kind]
    shape, columns = (fitting[0].shape, dict(fitting[0].columns)) if fitting else ("canonical", {})
    return [without_truth(row) for row in load_source(whole_file(path, shape, columns), kind, Path())]


def partial_path(out: Path) -> Path:
    """Where rows stand until all are made."""
    return out.with_name(out.name + ".partial")


def refuse_overwriting(out: Path, force: bool) -> None:
    """Raise UserError where the file, or a part of it from a run that was stopped, is there already."""
    if out.suffix != ".jsonl":
        raise UserError(f"--out is {out}, which does not end in .jsonl; name a file of JSON lines")
    for path in (out, partial_path(out)):
        if path.exists() and not force:
            raise UserError(f"{path} exists already; move it, name another file with --out, or add --force to lose it")


@contextmanager
def growing_file(out: Path) -> Iterator[Callable[[Row], None]]:
    """A function that writes one row at a time, to a partial file that takes its name when all are written.

    Whatever stops the work, Ctrl-C too, leaves the rows made so far in the partial file and says where.
    """
    partial = partial_path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with partial.open("w", encoding="utf-8") as file:

        def write(row: Row) -> None:
            nonlocal count
            file.write(row_line(row))
            file.flush()
            count += 1

        try:
            yield write
        except BaseException:
            if count:
                logger.warning("stopped: the %d rows made so far are in %s", count, partial)
            else:
                partial.unlink()
            raise
    os.replace(partial, out) if count else partial.unlink()
