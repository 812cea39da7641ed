"""The rows that have text, out of rows of any kind: which column it is, and what each row is called."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

from preskip.data.rows import Entry, is_number
from preskip.data.wikitext import is_wikitext, join_pages
from preskip.errors import PreskipError
from preskip.runs.files import LONE_SURROGATE

USUAL_COLUMNS = ("text", "content", "document", "article")
# What a row may say of its text; never the text itself.
_ABOUT = ("id", "group")
# Rows that tell which columns hold strings: a value may be missing in the first.
_FIRST_ROWS = 20


class Row(NamedTuple):
    """A text, its id, and the group it names itself."""

    id: str
    text: str
    group: str | None


def clean_text(text: str) -> str:
    """A text as it is tokenised: line ends as `\\n`, and U+FFFD for a lone surrogate, which has no bytes in UTF-8."""
    return LONE_SURROGATE.sub("\ufffd", text).replace("\r\n", "\n").replace("\r", "\n")


class Scan:
    """The rows with text of one reading, and how many had none."""

    def __init__(self, text_column: str | None) -> None:
        self.column = text_column
        self.rows = self.empty = 0
        self.page: tuple[tuple[str, int], str, str] | None = None  # the last one of WikiText: the next file may go on
        self.named: dict[str, tuple[str, str]] = {}  # where each id stands that a row names itself

    def texts(self, where: str, prefix: str, entries: Iterable[Entry], *, is_csv: bool = False) -> Iterator[Row]:
        """The rows that have text; the others keep their numbers. Rows that are lines of WikiText become its pages.

        The last of these pages is kept for the next call, which may go on with it, or for `rest`.

        Args:
            where: what is read, for messages.
            prefix: of the ids of rows that name none.
            entries: the rows.
            is_csv: a column of numbers is none of strings.
        """
        entries = iter(entries)
        first = list(islice(entries, _FIRST_ROWS))
        if not first:
            return
        column = _text_column(where, [entry.values for entry in first], self.column, is_csv)
        every = chain(first, entries)
        if is_wikitext((entry.values.get(column) for entry in first), continued=self.page is not None):
            rows = (((prefix, entry.number), entry.values.get(column)) for entry in every)
            opened, self.page = self.page, None
            for page in join_pages(rows, opened):
                yield from self.rest()
                self.page = page
            return
        yield from self.rest()
        for entry in every:
            text = entry.values.get(column)
            self.rows += 1
            if _is_missing(text):
                self.empty += 1
                continue
            if not isinstance(text, str):
                raise PreskipError(
                    f'{where}{entry.place}: no string "{column}" (it is a {_kind(text)}): every row must look like '
                    f'{{"{column}": "..."}}'
                )
            group = entry.values.get("group")
            yield Row(
                self._id(where, prefix, entry),
                clean_text(text),
                None if _is_missing(group) else clean_text(str(group)),
            )

    def rest(self) -> Iterator[Row]:
        """The page of WikiText that is still open, if there is one."""
        if self.page is not None:
            (prefix, number), title, text = self.page  # in the order of ids they are in that of the rows
            self.page = None
            yield Row(f"{prefix}#{number:08d} {clean_text(title)}", clean_text(text), None)

    def _id(self, where: str, prefix: str, entry: Entry) -> str:
        own = entry.values.get("id")
        id = f"{prefix}#{entry.number + 1}" if _is_missing(own) else clean_text(str(own))
        if id in self.named:
            file, place = self.named[id]
            first = place.removeprefix(", ") if file == where else file + place
            raise PreskipError(
                f"{where}{entry.place}: id {id!r} is already that of {first}: ids must be unique; call the column "
                "group if rows of one value belong together"
            )
        if "id" in entry.values:
            self.named[id] = where, entry.place
        return id


def _text_column(where: str, rows: list[dict[str, Any]], wanted: str | None, is_csv: bool) -> str:
    """The column of text: the one that is wanted, else one of a usual name, else the only one of strings."""
    kinds = _kinds(rows, is_csv)
    if not kinds:  # empty objects
        return wanted or USUAL_COLUMNS[0]
    columns = ", ".join(kinds)
    if wanted is not None:
        if wanted not in kinds:
            raise PreskipError(f"{where} has no column {wanted!r}: it has {columns} (--text-column)")
        if kinds[wanted] and "text" not in kinds[wanted]:
            raise PreskipError(f"{where}: column {wanted!r} holds no text: choose another with --text-column")
        return wanted
    strings = [name for name in kinds if "text" in kinds[name] and name not in _ABOUT]
    for usual in USUAL_COLUMNS:
        if usual in strings or kinds.get(usual) == set():  # nothing but missing texts so far
            return usual
        if usual == "text" and usual in kinds:
            raise PreskipError(
                f'{where}: no string "text" in any of its first rows (it holds a {min(kinds[usual])}): choose another '
                "column with --text-column"
            )
    if len(strings) == 1:
        return strings[0]
    if not strings:
        raise PreskipError(f"{where} has no column of text: it has {columns}")
    raise PreskipError(
        f"{where}: which column is the text? {', '.join(strings)} hold strings: choose one with --text-column, or call "
        "it text"
    )


def _kinds(rows: list[dict[str, Any]], is_csv: bool) -> dict[str, set[str]]:
    """What each column holds in these rows, its missing values apart."""
    kinds: dict[str, set[str]] = {name: set() for row in rows for name in row}
    for row in rows:
        for name, value in row.items():
            if not _is_missing(value):
                kinds[name].add("text" if isinstance(value, str) else _kind(value))
    if is_csv:  # where every value is written as a text
        for name in kinds:
            values = [row[name] for row in rows if row[name] is not None]
            if values and all(map(is_number, values)):
                kinds[name] = {"number"}
    return kinds


def _is_missing(value: Any) -> bool:
    """Null, NaN (what pandas writes for it), or blank."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _kind(value: Any) -> str:
    words = {bool: "truth value", int: "number", float: "number", list: "list", dict: "object"}
    return words.get(type(value), type(value).__name__)
