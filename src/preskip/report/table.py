"""What a table of the page is: headings, cells, rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

NONE = "–"


class Column(NamedTuple):
    """A heading; a column of numbers is set to the right and sorted by size."""

    title: str
    note: str = ""
    number: bool = True
    wrap: bool = False


class Cell(NamedTuple):
    """What stands in a table: its text, what stands small below, what it sorts by, or a verdict's badge, marked where
    the comparison is exploratory.
    """

    text: str
    note: str = ""
    sort: float | str | None = ""  # "": by its text; None: last
    badge: bool = False
    exploratory: bool = False


class Table(NamedTuple):
    """A table under its heading; a row's first cell names it."""

    label: str
    columns: list[Column]
    rows: list[list[Cell]]
    caption: str


def words(title: str, *, wrap: bool = False) -> Column:
    """A column of words."""
    return Column(title, number=False, wrap=wrap)


def make_table(label: str, columns: Iterable[Column | str], rows: Iterable[Sequence[Any]], caption: str = "") -> Table:
    """A table whose cells may be plain values; of columns a plain text heads numbers."""
    shown = [[cell if isinstance(cell, Cell) else Cell(str(cell)) for cell in row] for row in rows]
    return Table(label, [c if isinstance(c, Column) else Column(c) for c in columns], shown, caption or label)


def measured(sort: float | None, shown: dict[str, str] | None) -> Cell:
    """A value with its interval below it; a dash where there is none."""
    return Cell(NONE, sort=None) if shown is None else Cell(shown["value"], shown["interval"], sort)
