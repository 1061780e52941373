"""The reward of SQL by what it gives: a query is run on a database that it can only read, within limits."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

from rlhf.data.formats import Row
from rlhf.errors import UserError, first_line
from rlhf.params import Place
from rlhf.rewards.answers import expected_answers
from rlhf.rewards.places import find_answer

logger = logging.getLogger(__name__)
logging.getLogger("sqlglot").setLevel(logging.ERROR)  # it warns of every word that it does not know

READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
UNWANTED = {"load_extension", "random", "randomblob", "fts3_tokenizer", "sqlite_offset"}
"""Functions that reach outside, or give another result each time."""
CHECKED_EVERY = 1000
"""Instructions of SQLite's machine between two looks at the limits."""
LONGEST_QUERY = 10_000
LARGEST_RESULT = 20_000_000
LONGEST_VALUE = 1_000_000
"""Bytes of one value or row: a single instruction must not fill the memory."""


@dataclass(frozen=True)
class Limits:
    """What one query may take. The instructions are the same on every machine; the seconds only guard."""

    max_steps: int
    seconds: float
    max_rows: int


@dataclass(frozen=True)
class Result:
    """The rows that a query gives; `ordered` where the query asks for their order."""

    rows: list[tuple[Any, ...]]
    ordered: bool

    def equals(self, other: Result) -> bool:
        """Whether `other` gives the same rows equally often, in the same order where this one is ordered."""
        if self.ordered:
            return self.rows == other.rows
        return Counter(self.rows) == Counter(other.rows)


class SQLExecution:
    """1 where a completion's query gives what the one in the column `answer` gives, `runs` where it runs, else 0.

    `databases` is an SQLite file, or a folder of them in which the column `database` names one (`geo.sqlite`). What the
    right queries give is remembered. A query may do what it likes: it cannot write, and none makes this fail or hang.
    """

    def __init__(
        self, databases: Path, answer_in: Place, runs: float, limits: Limits, max_failing_share: float
    ) -> None:
        """Raises UserError where there is no such file or folder."""
        if not databases.exists():
            raise UserError(
                f"{databases}, which the reward 'sql' reads, does not exist; give an SQLite file or a folder"
            )
        self._databases = databases
        self._answer_in: Place = answer_in
        self._runs = runs
        self._limits = limits
        self._max_failing_share = max_failing_share
        self._right: dict[tuple[Path, str], Result | QueryError] = {}

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        answer: Sequence[Any] | None = None,
        database: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float]:
        queries = expected_answers(prompts, completions, answer)
        names = database or [None] * len(completions)
        return [
            self._score(find_answer(completion, self._answer_in), self._path(name), str(query))
            for completion, name, query in zip(completions, names, queries, strict=True)
        ]

    def check(self, rows: Sequence[Row]) -> None:
        """Run every right query. Raises UserError, naming the first row, where too many do not execute."""
        faults: list[tuple[Row, str]] = []
        for row in rows:
            (query,) = expected_answers([row["prompt"]], [""], [row.get("answer")])
            expected = self._expected(self._path(row.get("database")), str(query))
            if isinstance(expected, QueryError):
                faults.append((row, str(expected)))
        if not faults:
            return
        row, fault = faults[0]
        found = (
            f"{len(faults)} of {len(rows)} right queries do not execute, the first that of the prompt "
            f"{row.get('id', str(row['prompt'])[:60])!r} ({fault})"
        )
        if len(faults) > self._max_failing_share * len(rows):
            raise UserError(f"{found}; drop or mend those rows, or raise the limits of the reward 'sql'")
        logger.warning("%s; they pay nothing to any answer", found)

    def _score(self, query: str | None, path: Path, right: str) -> float:
        if query is None:
            return 0.0
        expected = self._expected(path, right)
        if isinstance(expected, QueryError):
            return 0.0
        try:
            return 1.0 if expected.equals(execute(path, query, self._limits)) else self._runs
        except QueryError:
            return 0.0

    def _expected(self, path: Path, query: str) -> Result | QueryError:
        """What the right query gives, or why it gives nothing."""
        if (path, query) not in self._right:
            try:
                self._right[path, query] = execute(path, query, self._limits)
            except QueryError as error:
                self._right[path, query] = error
        return self._right[path, query]

    def _path(self, name: Any) -> Path:
        """The database of a row. Raises UserError where the row names none, or one that does not lie in the folder."""
        if self._databases.is_file():
            return self._databases
        path = self._databases / str(name)
        if name is None or not path.is_file() or not path.resolve().is_relative_to(self._databases.resolve()):
            raise UserError(
                f"the column `database` is {name!r} in a prompt, which is no file in {self._databases}; map that "
                "column in prepare.data.prompts.columns, or give the reward 'sql' one SQLite file"
            )
        return path


class QueryError(Exception):
    """A query that is none, or that is refused, fails or takes too much."""


def execute(path: Path, query: str, limits: Limits) -> Result:
    """The rows of a query that only reads. Raises QueryError in every other case.

    It must be one SELECT (or a WITH, a UNION of them); the connection is read-only, and an authorizer allows nothing
    but reading; the limits hold for time, rows and the size of values.
    """
    ordered = _is_ordered(query)
    try:
        with closing(_open(path, limits)) as connection:
            rows = _read(connection.execute(query), limits.max_rows)
    except (sqlite3.Error, sqlite3.Warning, ValueError, MemoryError, OverflowError) as error:
        raise QueryError(first_line(error) or type(error).__name__) from None
    return Result(rows, ordered)


def _read(cursor: sqlite3.Cursor, max_rows: int) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    size = 0
    for row in cursor:
        rows.append(tuple(_rounded(value) for value in row))
        size += sum(len(value) for value in row if isinstance(value, (str, bytes)))
        if len(rows) > max_rows or size > LARGEST_RESULT:
            raise QueryError(f"more than {max_rows} rows" if len(rows) > max_rows else "too large a result")
    return rows


def _is_ordered(query: str) -> bool:
    """Whether the one SELECT that the text must be asks for an order."""
    if len(query) > LONGEST_QUERY:
        raise QueryError(f"longer than {LONGEST_QUERY} characters")
    try:
        statements = [one for one in sqlglot.parse(query, dialect="sqlite") if one is not None]
    except (SqlglotError, RecursionError, ValueError) as error:
        raise QueryError(f"no SQL: {first_line(error) or type(error).__name__}") from None
    if len(statements) != 1 or not isinstance(statements[0], exp.Query):
        raise QueryError(f"{len(statements)} statements" if len(statements) != 1 else "no SELECT")
    return statements[0].args.get("order") is not None


def _open(path: Path, limits: Limits) -> sqlite3.Connection:
    """A connection that only reads: `immutable` leaves no lock or journal beside the file."""
    connection = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro&immutable=1", uri=True)
    connection.text_factory = lambda content: content.decode("utf-8", "replace")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
    connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 100)
    connection.set_authorizer(_authorise)
    allowed, deadline = limits.max_steps // CHECKED_EVERY, time.monotonic() + limits.seconds
    taken = 0

    def is_over() -> bool:
        nonlocal taken
        taken += 1
        return taken > allowed or time.monotonic() > deadline

    connection.set_progress_handler(is_over, CHECKED_EVERY)
    return connection


def _authorise(action: int, _first: str | None, second: str | None, *_: str | None) -> int:
    is_function = action == sqlite3.SQLITE_FUNCTION and (second or "").lower() not in UNWANTED
    return sqlite3.SQLITE_OK if action in READING or is_function else sqlite3.SQLITE_DENY


def _rounded(value: Any) -> Any:
    """Nine digits: sums in another order differ in the last ones."""
    return float(f"{value:.9g}") if isinstance(value, float) else value
