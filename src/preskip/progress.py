"""Progress of long steps on the terminal: a bar with the time left, on stderr, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# advance(done, note): how many units are done in all, and a short note such as the current loss.
Advance = Callable[[int, str], None]


def no_progress(done: int, note: str = "") -> None:
    """The `Advance` that shows nothing."""


@contextmanager
def progress_bar(description: str, total: int, *, quiet: bool = False) -> Iterator[Advance]:
    """Show one long step.

    Args:
        description: what is being done.
        total: number of units (steps, batches).
        quiet: show nothing.
    """
    if quiet:
        yield no_progress
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{description} ...", highlight=False)
        yield no_progress
        return
    columns = (
        TextColumn("{task.description}", style="bold"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total, note="")

        def advance(done: int, note: str = "") -> None:
            progress.update(task, completed=done, note=note)

        yield advance
