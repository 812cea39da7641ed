"""A table at the width it needs: too narrow a terminal wraps lines, cutting figures off would be worse."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_UNBOUNDED = 1000


def columns(*left: str, right: Iterable[str], last: str | None = None, **options: Any) -> Table:
    """An empty table: columns of words, columns of figures, and perhaps one more of words."""
    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False, title_justify="left", **options)
    for headings, justify in ((left, "left"), (right, "right"), ((last,) if last else (), "left")):
        for heading in headings:
            table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    return table


def print_wide(table: Table, notes: Iterable[str] = (), lines: Iterable[str] = (), *, stderr: bool = False) -> None:
    """Print a table, wider than the terminal where its figures need it, then dim notes, then lines."""
    console = Console(stderr=stderr)
    options = console.options.update(width=_UNBOUNDED, max_width=_UNBOUNDED)
    width = console.width
    console.width = max(width, Measurement.get(console, options, table).maximum)
    console.print(table, highlight=False)
    console.width = width
    for text, style in (*((note, "dim") for note in notes), *((line, None) for line in lines)):
        console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)
