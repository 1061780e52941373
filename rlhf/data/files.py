"""The files rows are read from, one row after the other: JSON lines, CSV, Parquet, saved folders; JSON at once."""

from __future__ import annotations

import codecs
import csv
import datetime
import decimal
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from rlhf.data.formats import Row
from rlhf.errors import UserError, brief, first_line

if TYPE_CHECKING:
    from datasets import Dataset

CSV_NUMBERS = ("margin", "weight", "score")
"""Columns that mean a number, so their CSV cells are read as one where they can be."""
BATCH = 1024
"""Rows taken at a time from files that are stored by column."""

Placed = tuple[int, Row]
"""A row behind its place in the file, counted from 1."""


@dataclass(frozen=True)
class Records:
    """The rows of a file with their places; every loop reads it anew. `unit` says what a place counts."""

    shown: str
    unit: str
    read: Callable[[], Iterator[Placed]]

    def __iter__(self) -> Iterator[Placed]:
        """Every row with its place. Raises UserError as `read_file` says."""
        is_empty = True
        try:
            for placed in self.read():
                is_empty = False
                yield placed
        except ImportError as error:
            raise UserError(
                f"{self.shown} cannot be read: the package {error.name} is not installed; install it or give JSONL"
            ) from None
        except OSError as error:
            raise UserError(
                f"{self.shown} cannot be read ({error.strerror or error}); check the path and its permissions"
            ) from None
        if is_empty:
            raise UserError(f"{self.shown} is empty; give a file with at least one row")

    @property
    def rows(self) -> list[Row]:
        """All rows at once."""
        return [row for _, row in self]


def read_file(path: Path, shown: str) -> Records:
    """The rows of a file or saved folder, values as they stand there; `shown` names it in messages.

    Raises UserError for a file that is missing or of an unknown extension, and as it is read for one that is
    unreadable, empty, not UTF-8 or malformed, with the line where there is one, and for a reader that is not installed.
    Null and non-text values are no business of this function.
    """
    if not path.exists():
        raise UserError(f"{shown} does not exist; give a path relative to the repository's root, or run `dvc pull`")
    if path.is_dir():
        return Records(shown, "row", lambda: _read_folder(path, shown))
    readers = {
        ".jsonl": ("line", _read_json_lines),
        ".json": ("row", _read_json),
        ".csv": ("line", _read_csv),
        ".parquet": ("row", _read_parquet),
    }
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_zipped = suffixes[-1:] == [".gz"]
    suffix = (suffixes[-2:-1] if is_zipped else suffixes[-1:]) or [""]
    if suffix[0] not in readers or (is_zipped and suffix[0] == ".parquet"):
        raise UserError(
            f"{shown} has the unknown extension '{''.join(suffixes[-2:] if is_zipped else suffixes[-1:])}'; "
            "use .jsonl, .json or .csv (each also .gz), .parquet, or a folder saved by `datasets`"
        )
    unit, reader = readers[suffix[0]]
    return Records(shown, unit, lambda: reader(path, shown))


# text ---------------------------------------------------------------------------------------------


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _zip_error(shown: str, error: Exception) -> UserError:
    return UserError(f"{shown} is no complete gzip file ({error}); zip it again")


def _text_lines(path: Path, shown: str) -> Iterator[str]:
    """The lines of a text, unzipped, without a byte-order mark.

    Only a line feed ends a line: others, such as U+2028, may stand in JSON texts.
    """
    passed = 0
    with _open(path) as file:
        try:
            for number, data in enumerate(file, start=1):
                if number == 1:
                    data = _without_mark(data, shown)
                yield _decode(data, passed, shown, number)
                passed += len(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _zip_error(shown, error) from None


def _without_mark(data: bytes, shown: str) -> bytes:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{shown} is UTF-16, not UTF-8 (byte 0, line 1); save it as UTF-8")
    return data.removeprefix(codecs.BOM_UTF8)


def _decode(data: bytes, passed: int, shown: str, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, value = passed + error.start, data[error.start]
        raise UserError(f"{shown}, line {line}: byte {byte} (0x{value:02x}) is not UTF-8; save it as UTF-8") from None


def _parse(text: str, shown: str, line: int, remedy: str) -> Any:
    """JSON that starts on the given line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{shown}, line {line + error.lineno - 1}"
        raise UserError(f"{place}: not valid JSON ({error.msg} at column {error.colno}); {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown}, line {line}: not readable as JSON ({error}); {remedy}") from None


def _require_object(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{place}: holds {_json_name(value)}, not an object; write one object with named columns")
    return value


def _may_hold_halves(text: str) -> bool:
    """Whether an escape could stand for half of a surrogate pair, which is no character."""
    return "\\ud" in text or "\\uD" in text


def _refuse_halves(value: Any, place: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(
            f"{place}: not UTF-8, {half} is half of a surrogate pair; mend or drop that character"
        ) from None


def _json_name(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), "an object")


def _read_json_lines(path: Path, shown: str) -> Iterator[Placed]:
    for number, line in enumerate(_text_lines(path, shown), start=1):
        if line.strip():
            place = f"{shown}, line {number}"
            row = _require_object(_parse(line.removesuffix("\n"), shown, number, "mend that line"), place)
            if _may_hold_halves(line):
                _refuse_halves(row, place)
            yield number, row


def _read_json(path: Path, shown: str) -> Iterator[Placed]:
    text = "".join(_text_lines(path, shown))
    if not text.strip():
        return
    content = _parse(text, shown, 1, "mend that line, or name the file .jsonl if it holds one object per line")
    if not isinstance(content, list):
        raise UserError(f"{shown} holds {_json_name(content)}, not a list of objects; save the list alone")
    may_hold_halves = _may_hold_halves(text)
    for number, value in enumerate(content, start=1):
        place = f"{shown}, row {number}"
        row = _require_object(value, place)
        if may_hold_halves:
            _refuse_halves(row, place)
        yield number, row


def _read_csv(path: Path, shown: str) -> Iterator[Placed]:
    csv.field_size_limit(2**31 - 1)  # the default refuses cells above 131,072 characters
    header: list[str] = []
    first_line = 1
    with _open(path) as file:
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
        try:
            for cells in reader:
                if not header:
                    header = _csv_header(cells, f"{shown}, line {first_line}")
                elif cells:
                    if len(cells) != len(header):
                        raise UserError(
                            f"{shown}, line {first_line}: {len(cells)} cells under {len(header)} columns; quote cells "
                            "that hold commas"
                        )
                    yield first_line, {name: _csv_value(name, cell) for name, cell in zip(header, cells, strict=True)}
                first_line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{shown}, line {first_line}: not valid CSV ({error}); mend that line") from None
        except UnicodeDecodeError:
            for _ in _text_lines(path, shown):  # which names the line
                pass
            raise
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise _zip_error(shown, error) from None


def _csv_header(cells: list[str], place: str) -> list[str]:
    bad = next((brief(name) for name in cells if not name.strip() or cells.count(name) > 1), None)
    if bad is not None:
        raise UserError(f"{place}: the column name {bad!r} is empty or stands twice; give every column its own name")
    return cells


def _csv_value(name: str, cell: str) -> Any:
    if name.startswith("truth_") and cell.lower() in ("true", "false"):
        return cell.lower() == "true"
    if name in CSV_NUMBERS:
        try:
            return float(cell)
        except ValueError:
            return cell
    return cell


# stored by column ---------------------------------------------------------------------------------


def _read_parquet(path: Path, shown: str) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=BATCH)
        yield from _numbered((row for batch in batches for row in batch.to_pylist()), shown)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:  # pyarrow raises one without a number for a damaged page
            raise
        raise UserError(f"{shown} is no readable Parquet file ({first_line(error)}); write it again") from None


def _read_folder(path: Path, shown: str) -> Iterator[Placed]:
    # What `save_to_disk` leaves behind tells such a folder from any other before the slow import.
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise UserError(f"{shown} is a folder that `datasets` did not save; name a file, or save with `save_to_disk`")
    import datasets

    try:
        dataset = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{shown} is a damaged `datasets` folder ({first_line(error)}); save it again") from None
    if isinstance(dataset, datasets.DatasetDict):
        if len(dataset) != 1:
            raise UserError(
                f"{shown} holds the splits {', '.join(map(str, dataset))}; "
                f"name one of them, such as {shown}/{next(iter(dataset), '')}"
            )
        dataset = next(iter(dataset.values()))
    yield from dataset_rows(dataset, shown)


def dataset_rows(dataset: Dataset, shown: str) -> Iterator[Placed]:
    """The rows of a data set with their numbers, a batch at a time. Raises UserError as `plain_row` does, and for text
    that is no UTF-8.
    """
    batches: Any = dataset.with_format("arrow").iter(BATCH)
    try:
        yield from _numbered((row for batch in batches for row in batch.to_pylist()), shown)
    except UnicodeDecodeError as error:
        raise UserError(f"{shown} holds text that is no UTF-8 ({error}); save it again") from None


def _numbered(rows: Iterable[Row], shown: str) -> Iterator[Placed]:
    return ((number, plain_row(row, shown)) for number, row in enumerate(rows, start=1))


def plain_row(row: Row, shown: str) -> Row:
    """The row with nothing but what JSON can hold: dates become ISO texts, decimals numbers.

    Raises UserError naming the column of a value that has no JSON form (bytes, images, audio).
    """
    return {name: _plain(value, name, shown) for name, value in row.items()}


def _plain(value: Any, column: str, shown: str) -> Any:
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(inner, column, shown) for inner in value]
    if isinstance(value, dict):
        return {str(key): _plain(inner, column, shown) for key, inner in value.items()}
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return float(value)
    raise UserError(f"{shown}: column {column} holds {type(value).__name__}, which JSON cannot; drop that column")
