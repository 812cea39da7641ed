"""The rows of one local file, whatever its form: JSON lines, JSON, CSV, TSV, Parquet or Arrow; and plain text."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from preskip.errors import PreskipError

_TEXT_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_FORMATS = {".parquet": "parquet", ".arrow": "arrow", **_TEXT_FORMATS}
# Rows of a Parquet file that are held at once.
_PARQUET_ROWS = 100
_SEPARATORS = (",", ";", "\t", "|")
# Names of columns are shorter than this; a first row with more words is a row of texts.
_LONGEST_NAME = 4
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Entry(NamedTuple):
    """One row: its number from 0, its values by column, and where it stands, for messages (" line 3")."""

    number: int
    values: dict[str, Any]
    place: str


def format_of(path: Path) -> str | None:
    """The form that a file's name stands for, None for others: parquet, arrow, csv, json or jsonl."""
    name = path.name.lower()
    return _TEXT_FORMATS.get(Path(name[:-3]).suffix) if name.endswith(".gz") else _FORMATS.get(path.suffix.lower())


def without_form(name: str) -> str:
    """A file's name without what stands for its form: `a` of `a.jsonl.gz`."""
    return str(Path(name[:-3] if name.lower().endswith(".gz") else name).with_suffix(""))


def rows_of(path: Path, text_column: str | None = None) -> Iterator[Entry]:
    """The rows of a file; they are read as they are asked for, except those of JSON that is no JSON lines.

    Args:
        path: the file.
        text_column: asked for; the first line of a CSV that holds it is the header, whatever else it looks like.

    Raises:
        PreskipError: a row is not of the file's form; its line is named. What libraries raise for a damaged file
            passes through.
    """
    match format_of(path):
        case "jsonl":
            with open_text(path) as lines:
                yield from _json_lines(path, lines)
        case "json":
            with open_text(path) as file:
                yield from _json_rows(path, file.read())
        case "csv":
            with open_text(path) as lines:
                yield from _csv_rows(path, lines, text_column)
        case kind:
            yield from _table_rows(path, str(kind))


def open_text(path: Path) -> io.TextIOWrapper:
    """A text file, also packed with gzip: UTF-8, or UTF-16 where its mark says so; line ends as they are."""
    opened: Any = gzip.open if path.name.lower().endswith(".gz") else open
    with opened(path, "rb") as file:
        start = file.read(2)
    encoding = "utf-16" if start in _UTF16 else "utf-8-sig"
    return io.TextIOWrapper(opened(path, "rb"), encoding=encoding, newline="")


def read_text(path: Path) -> str:
    """The whole content of a text file, line ends as `\\n`.

    Raises:
        PreskipError: it cannot be read, is damaged, is neither UTF-8 nor UTF-16, or holds zero bytes.
    """
    try:
        with open_text(path) as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise PreskipError(
            f"corpus file {path} is not UTF-8 (byte {error.start}): convert it, for example with iconv"
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PreskipError(
            f"corpus file {path} cannot be read as gzip, it may be damaged or cut short ({error}): pack it again"
        ) from error
    except OSError as error:
        raise PreskipError(f"corpus file {path} cannot be read ({error.strerror}): check its permissions") from error
    _refuse_zero_bytes(path, text)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _refuse_zero_bytes(path: Path, text: str) -> None:
    if "\0" in text:
        raise PreskipError(f"corpus file {path} is not text (it contains zero bytes): give a UTF-8 text file")


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[Entry]:
    # TextIOWrapper ends lines at \n, \r\n and \r alone: JSON strings may hold U+2028 and its like unescaped.
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f", line {number}"
        _refuse_zero_bytes(path, line)
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PreskipError(
                f"corpus file {path}{place}: not valid JSON ({error}): every line must be one JSON object"
            ) from error
        yield _object(path, count, values, place)
        count += 1


def _json_rows(path: Path, text: str) -> Iterator[Entry]:
    _refuse_zero_bytes(path, text)
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        yield from _json_lines(path, io.StringIO(text, newline=""))  # JSON lines of another name
        return
    if isinstance(content, dict):
        content = _listed(content)
    if not isinstance(content, list):
        raise PreskipError(f"corpus file {path}: give a list of objects with a text each, or one object per line")
    are_texts = all(isinstance(value, str) for value in content)
    for number, value in enumerate(content):
        yield _object(path, number, {"text": value} if are_texts else value, f", item {number + 1}")


def _listed(content: dict[str, Any]) -> Any:
    """The rows in an object: its only list of objects, its columns that are lists or objects by row, or itself."""
    lists = [value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) == 1:
        return lists[0]
    columns = {name: list(value.values()) if isinstance(value, dict) else value for name, value in content.items()}
    if columns and all(isinstance(value, list) for value in columns.values()):
        if len({len(value) for value in columns.values()}) == 1:
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return None
    return [content]


def _object(path: Path, number: int, values: Any, place: str) -> Entry:
    if not isinstance(values, dict):
        raise PreskipError(
            f'corpus file {path}{place}: no string "text": every line or item must look like {{"text": "..."}}'
        )
    return Entry(number, values, place)


def _csv_rows(path: Path, lines: io.TextIOWrapper, text_column: str | None) -> Iterator[Entry]:
    """The rows of a CSV with a header. It is parsed by its header's separator; a ragged row is refused."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a text may be longer than the library's 128 KiB
    first = next(lines, "")
    while first and not first.strip():
        first = next(lines, "")
    if not first:
        return
    own = "\t" if ".tsv" in path.name.lower() else ","
    separators = [own, *(other for other in _SEPARATORS if other != own)]
    separator = next((one for one in separators if len(next(csv.reader([first], delimiter=one))) > 1), own)
    reader = csv.reader(chain([first], lines), delimiter=separator, strict=True)
    names: list[str] | None = None
    count = 0
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise PreskipError(
                f"corpus file {path} cannot be read as csv, it may be damaged or cut short (line {reader.line_num}: "
                f"{error}): close every quote"
            ) from None
        if row is None:
            return
        if not row:
            continue
        if names is None:
            names = _header(path, row, text_column)
            continue
        if len(row) != len(names):
            raise PreskipError(
                f"corpus file {path}, line {reader.line_num}: {len(row)} field{'s' * (len(row) != 1)} where the header "
                f"has {len(names)}: quote texts that hold {separator!r}, or give every row {len(names)}"
            )
        if any("\0" in cell for cell in row):
            _refuse_zero_bytes(path, "\0")
        values = {name: cell or None for name, cell in zip(names, row, strict=True) if name}
        yield Entry(count, values, f", line {reader.line_num}")
        count += 1


def _header(path: Path, row: list[str], text_column: str | None) -> list[str]:
    names = [name.strip() for name in row]
    filled = [name for name in names if name]
    if twice := next((name for name in filled if filled.count(name) > 1), None):
        raise PreskipError(f"corpus file {path}: two columns are named {twice!r}: give every column a name of its own")
    if not {"text", text_column} & set(filled) and (not filled or any(_is_value(name) for name in filled)):
        shown = next((name for name in filled if _is_value(name)), "")
        raise PreskipError(
            f"corpus file {path}: its first line names no columns ({shown[:40]!r} looks like a value): put a line with "
            "names, such as text, on top; if it is a name, rename the column, or name the column of text with "
            "--text-column"
        )
    return names


def _is_value(name: str) -> bool:
    return is_number(name) or len(name.split()) > _LONGEST_NAME or name.endswith((".", "!", "?", "。"))


def is_number(text: str) -> bool:
    """Whether a cell holds a number and no text."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _table_rows(path: Path, kind: str) -> Iterator[Entry]:
    if kind == "parquet":
        from pyarrow import parquet

        # Not through `datasets`, whose reader refuses columns of maps and decodes those of pictures.
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(_PARQUET_ROWS, use_threads=False) for row in batch.to_pylist())
            yield from (Entry(number, values, f", row {number + 1}") for number, values in enumerate(rows))
        return
    import datasets

    # Streaming makes no copy in the cache.
    stream = datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=True)
    for number, values in enumerate(stream):
        yield Entry(number, values, f", row {number + 1}")
