"""Progress of long steps on the terminal: a bar with the time left, on stderr, or nothing at all."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# Columns of a terminal from which a bar, the time so far and a note have room beside the figures.
WIDE = 70

# advance(done, note): how many units are done in all, and a short note such as the current loss.
Advance = Callable[[int, str], None]


def no_progress(done: int, note: str = "") -> None:
    """The `Advance` that shows nothing."""


@contextmanager
def progress_display(description: str, *, quiet: bool = False) -> Iterator[Progress | None]:
    """A display for code that adds its tasks itself; None, after one line on stderr, where there is no terminal.

    Args:
        description: what is being done, for the line.
        quiet: show nothing.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        if not quiet:
            console.print(f"{description} ...", highlight=False)
        yield None
        return
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", style="bold"),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    if console.width >= WIDE:  # on less, the figures would be cut
        columns[1:1] = [BarColumn(bar_width=28)]
        columns[3:3] = [TimeElapsedColumn()]
        columns.append(_NoteColumn())
    with Progress(*columns, console=console) as progress:
        yield progress


@contextmanager
def progress_bar(description: str, total: int, *, quiet: bool = False) -> Iterator[Advance]:
    """Show one long step.

    Args:
        description: what is being done.
        total: number of units (steps, sequences).
        quiet: show nothing.
    """
    with progress_display(description, quiet=quiet) as progress:
        if progress is None:
            yield no_progress
            return
        task = progress.add_task(description, total=total)

        def advance(done: int, note: str = "") -> None:
            progress.update(task, completed=done, note=note)

        yield advance


@contextmanager
def spinner(description: str, *, quiet: bool = False) -> Iterator[None]:
    """Show that a step without countable units goes on; it leaves nothing behind on the terminal.

    Args:
        description: what is being done.
        quiet: show nothing.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield
        return
    with console.status(f"{description} ..."):
        yield


def say(text: str, *, quiet: bool = False) -> None:
    """Print one line on stderr, or nothing."""
    if not quiet:
        Console(stderr=True, soft_wrap=True).print(text, highlight=False, markup=False)


class _NoteColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields.get("note", ""), style="dim")


def quiet_libraries() -> None:
    """Errors of the libraries stay; their notices would break the progress bars."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # GPT-2's Conv1D; PEFT corrects it
    # It tells of an optional kernel that no command here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
