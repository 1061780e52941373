"""The files rows are read from: JSON lines, JSON, CSV, Parquet and folders saved by `datasets`."""

from __future__ import annotations

import codecs
import csv
import datetime
import decimal
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.formats import Row
from rlhf.errors import UserError

CSV_NUMBERS = ("margin", "weight", "score")
"""Columns that mean a number, so their CSV cells are read as one where they can be."""


@dataclass(frozen=True)
class Records:
    """Rows with their place in the file: `unit` is `line` or `row`, counted from 1."""

    rows: list[Row]
    places: list[int]
    unit: str


def read_file(path: Path, shown: str) -> Records:
    """All rows of a file or saved folder, values as they stand there; `shown` names it in messages.

    Raises UserError for a file that is missing, unreadable, empty, of an unknown extension, not UTF-8,
    or malformed, with the line where there is one, and for a reader that is not installed.
    Null and non-text values are no business of this function.
    """
    reader = _reader(path, shown)
    try:
        records = reader(path, shown)
    except ImportError as error:
        raise UserError(
            f"{shown} cannot be read: the package {error.name} is not installed; install it or give a JSONL file"
        ) from None
    except OSError as error:
        raise UserError(
            f"{shown} cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from None
    if not records.rows:
        raise UserError(f"{shown} is empty; give a file with at least one row")
    return records


def _reader(path: Path, shown: str) -> Callable[[Path, str], Records]:
    if not path.exists():
        raise UserError(f"{shown} does not exist; give a path relative to the repository's root, or run `dvc pull`")
    if path.is_dir():
        return _read_folder
    readers = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_zipped = suffixes[-1:] == [".gz"]
    suffix = (suffixes[-2:-1] if is_zipped else suffixes[-1:]) or [""]
    if suffix[0] not in readers or (is_zipped and suffix[0] == ".parquet"):
        raise UserError(
            f"{shown} has the unknown extension '{''.join(suffixes[-2:] if is_zipped else suffixes[-1:])}'; "
            "use .jsonl, .json or .csv (each also .gz), .parquet, or a folder saved by `datasets`"
        )
    return readers[suffix[0]]


def _read_text(path: Path, shown: str) -> str:
    """The whole file as text, unzipped, without a byte-order mark."""
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{shown} is no complete gzip file ({error}); zip it again") from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{shown} is UTF-16, not UTF-8 (byte 0, line 1); save it as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{shown}, line {line}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; save it as UTF-8"
        ) from None


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
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(
            f"{place}: not UTF-8, {half} is half of a surrogate pair; mend or drop that character"
        ) from None
    return value


def _json_name(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), "an object")


def _read_json_lines(path: Path, shown: str) -> Records:
    rows: list[Row] = []
    places: list[int] = []
    # Only \n ends a line: str.splitlines would also cut at U+2028, which JSON texts may hold.
    for number, line in enumerate(_read_text(path, shown).split("\n"), start=1):
        if line.strip():
            rows.append(_require_object(_parse(line, shown, number, "mend that line"), f"{shown}, line {number}"))
            places.append(number)
    return Records(rows, places, "line")


def _read_json(path: Path, shown: str) -> Records:
    text = _read_text(path, shown)
    if not text.strip():
        return Records([], [], "row")
    content = _parse(text, shown, 1, "mend that line, or name the file .jsonl if it holds one object per line")
    if not isinstance(content, list):
        raise UserError(f"{shown} holds {_json_name(content)}, not a list of objects; save the list alone")
    rows = [_require_object(value, f"{shown}, row {number}") for number, value in enumerate(content, start=1)]
    return _numbered(rows)


def _read_csv(path: Path, shown: str) -> Records:
    csv.field_size_limit(2**31 - 1)  # the default refuses cells above 131,072 characters
    reader = csv.reader(io.StringIO(_read_text(path, shown), newline=""), strict=True)
    rows: list[Row] = []
    places: list[int] = []
    header: list[str] = []
    first_line = 1
    try:
        for cells in reader:
            if not header:
                header = _csv_header(cells, f"{shown}, line {first_line}")
            elif cells:
                if len(cells) != len(header):
                    raise UserError(
                        f"{shown}, line {first_line}: {len(cells)} cells under {len(header)} columns; quote the cells"
                    )
                rows.append({name: _csv_value(name, cell) for name, cell in zip(header, cells, strict=True)})
                places.append(first_line)
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{shown}, line {first_line}: not valid CSV ({error}); mend that line") from None
    return Records(rows, places, "line")


def _csv_header(cells: list[str], place: str) -> list[str]:
    bad = next((name for name in cells if not name.strip() or cells.count(name) > 1), None)
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


def _read_parquet(path: Path, shown: str) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except pyarrow.ArrowException as error:
        raise UserError(f"{shown} is no readable Parquet file ({str(error).splitlines()[0]}); write it again") from None
    return _numbered(plain_rows(table.to_pylist(), shown))


def _read_folder(path: Path, shown: str) -> Records:
    # What `save_to_disk` leaves behind tells such a folder from any other before the slow import.
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise UserError(f"{shown} is a folder that `datasets` did not save; name a file, or save with `save_to_disk`")
    import datasets

    try:
        dataset = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{shown} is a damaged `datasets` folder ({str(error).splitlines()[0]}); save it again"
        ) from None
    if isinstance(dataset, datasets.DatasetDict):
        if len(dataset) != 1:
            raise UserError(
                f"{shown} holds the splits {', '.join(map(str, dataset))}; "
                f"name one of them, such as {shown}/{next(iter(dataset), '')}"
            )
        dataset = next(iter(dataset.values()))
    return _numbered(plain_rows(dataset.with_format(None).to_list(), shown))


def _numbered(rows: list[Row]) -> Records:
    return Records(rows, list(range(1, len(rows) + 1)), "row")


def plain_rows(rows: Iterable[Row], shown: str) -> list[Row]:
    """The rows with nothing but what JSON can hold: dates become ISO texts, decimals numbers.

    Raises UserError naming the column of a value that has no JSON form (bytes, images, audio).
    """
    return [{name: _plain(value, name, shown) for name, value in row.items()} for row in rows]


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
