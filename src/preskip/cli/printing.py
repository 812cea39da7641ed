"""Tables that fit the terminal: long words are folded, columns without room go below, beside the first one again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from preskip.metrics import metric_named
from preskip.progress import console
from preskip.report.words.verdicts import amount, difference_text

# Words are folded to no less than this.
LEAST_WIDTH = 24
_UNBOUNDED = 1000
# Columns between two columns of a table.
_GAP = 2
# Behind a verdict word, and explained by the note below.
EXPLORATORY = "†"
EXPLORATORY_NOTE = (
    f"{EXPLORATORY} exploratory: not declared before training, p not corrected for the number of comparisons; a hint, "
    "not a finding"
)
STYLES = {"better": "green", "supported": "green", "worse": "red", "contradicted": "red", "mixed": "yellow"}


def columns(*left: str, right: Iterable[str], last: str | None = None) -> Table:
    """An empty table: columns of words, columns of figures, and perhaps one more of words."""
    table = Table(
        header_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title_justify="left",
    )
    for headings, justify in ((left, "left"), (right, "right"), ((last,) if last else (), "left")):
        for heading in headings:
            table.add_column(heading, justify=justify, no_wrap=justify == "right", overflow="fold")  # type: ignore[arg-type]
    return table


def print_table(table: Table, notes: Iterable[str] = (), lines: Iterable[str] = (), *, stderr: bool = False) -> None:
    """Print a table, then dim notes, then lines that are not folded.

    Columns that have no room are printed below, beside the first one again. A single figure that is wider than the
    terminal is still printed whole.
    """
    out = console(stderr=stderr)
    width = out.width
    least = [_least_width(out, table, place) for place in range(len(table.columns))]
    first, *rest = range(len(table.columns))
    while rest:
        chosen = [first, rest.pop(0)]
        while rest and _sum([least[place] for place in (*chosen, rest[0])]) <= width:
            chosen.append(rest.pop(0))
        out.width = max(width, _sum([least[place] for place in chosen]))
        out.print(_part(table, chosen))
        out.print()
        out.width = width
    for note in notes:
        out.print(note, style="dim")
    for line in lines:
        out.print(line, soft_wrap=True)


def verdict_text(word: str, *, is_declared: bool = True) -> Text:
    """A verdict in its colour; with a mark where it rests on a comparison that was not declared."""
    return Text(word if is_declared else f"{word} {EXPLORATORY}", style=STYLES.get(word, ""))


def difference_cell(entry: Mapping[str, Any]) -> str:
    """A paired difference with its interval; of one that allows every accuracy it is said that it resolves nothing."""
    text = difference_text(entry)
    if metric_named(entry["metric"]).is_accuracy and entry["low"] <= -1 and entry["high"] >= 1:
        return f"{text['value']} (resolves nothing)"
    return f"{text['value']} {text['interval']}"


def size_cell(metric: str, size: float) -> str:
    """An unsigned size without its unit; "nothing" where no accuracy could differ by so much."""
    about = metric_named(metric)
    return "nothing" if about.is_accuracy and size > 1 else amount(metric, size).removesuffix(about.difference_unit)


def _part(table: Table, chosen: Sequence[int]) -> Table:
    part = copy.copy(table)
    part.columns = [replace(table.columns[place], _index=index) for index, place in enumerate(chosen)]
    return part


def _least_width(out: Console, table: Table, place: int) -> int:
    """The width of a column at which no figure of it is cut."""
    options: Any = out.options.update(width=_UNBOUNDED, max_width=_UNBOUNDED)
    natural = Measurement.get(out, options, _part(table, [place])).maximum
    return natural if table.columns[place].no_wrap else min(natural, LEAST_WIDTH)


def _sum(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)
