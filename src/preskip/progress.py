"""What is said on the terminal: text as it stands, and the progress of long steps on stderr.

Nothing here ends the work that it shows: what goes wrong in showing it is passed over.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

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
# Without a terminal, seconds between two lines of a long step.
BEAT = 30.0
# Which step of how many is going on, before its heartbeat; one run per process.
_place = ""

# advance(done, note): how many units are done in all, and a short note such as the current loss.
Advance = Callable[[int, str], None]


def console(*, stderr: bool = False, soft_wrap: bool = False) -> Console:
    """A console for text that may hold anything: paths, names, messages, a model's tokens.

    Colour comes from `rich.text.Text` and from `style`.

    Args:
        stderr: print there, in place of stdout.
        soft_wrap: long lines are left to the terminal, so that a path stays whole when it is copied.
    """
    return _Console(stderr=stderr, soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False)


def no_progress(done: int, note: str = "") -> None:
    """The `Advance` that shows nothing."""


@contextmanager
def progress_display(description: str, *, quiet: bool = False) -> Iterator[Progress | None]:
    """A display for code that adds its tasks itself; None, after one line on stderr, where there is no terminal.

    Args:
        description: what is being done, for the line.
        quiet: show nothing.
    """
    out = console(stderr=True)
    if quiet or not out.is_terminal:
        with _beating(description, None, quiet=quiet):
            yield None
        return
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}", style="bold", markup=False),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    if out.width >= WIDE:  # on less, the figures would be cut
        columns[1:1] = [BarColumn(bar_width=28)]
        columns[3:3] = [TimeElapsedColumn()]
        columns.append(_NoteColumn())
    with _shown(_Display(*columns, console=out)) as progress:
        yield progress


@contextmanager
def progress_bar(description: str, total: int, *, quiet: bool = False) -> Iterator[Advance]:
    """Show one long step.

    Args:
        description: what is being done.
        total: number of units (steps, sequences).
        quiet: show nothing.
    """
    if quiet or not console(stderr=True).is_terminal:
        with _beating(description, total, quiet=quiet) as beat:
            yield beat
        return
    with progress_display(description) as progress:
        if progress is None:  # the terminal is gone
            yield no_progress
            return
        task = progress.add_task(description, total=total)

        def advance(done: int, note: str = "") -> None:
            with suppress(Exception):
                progress.update(task, completed=done, note=note)

        yield advance


class Heartbeat:
    """The line of a long step where there is no terminal, such as "[3/12] train lora · 120/500 · about 2 min left".

    Args:
        description: what is being done.
        total: number of units, or None where they cannot be counted.
        clock: seconds, of any beginning.
    """

    def __init__(self, description: str, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.description, self.total, self.clock = description, total, clock
        self.started = clock()
        self.done = 0
        self.first: tuple[float, int] | None = None  # a resumed step does not begin at 0

    def advance(self, done: int, note: str = "") -> None:
        """See `Advance`."""
        self.done = done
        self.first = self.first or (self.clock(), done)

    def line(self) -> str:
        """What is done, and what the time left is by the units done so far."""
        now, parts = self.clock(), [f"{_place}{self.description}"]
        if self.total is not None:
            parts.append(f"{self.done}/{self.total}")
        since, before = self.first or (self.started, 0)
        if self.total is None or self.done <= before:
            parts.append(f"{about(now - self.started)} so far")
        else:
            parts.append(f"{about((now - since) / (self.done - before) * (self.total - self.done))} left")
        return " · ".join(parts)

    def beat(self, stopped: threading.Event) -> None:
        """Say the line again and again, until the step is done."""
        while not stopped.wait(BEAT):
            say(self.line())


def about(seconds: float) -> str:
    """A time as it is said: "about 40 s", "about 12 min", "about 3.5 h"."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 90 * 60 else f"about {seconds / 3600:.1f} h"


@contextmanager
def placed(number: int, total: int) -> Iterator[None]:
    """Say before every heartbeat in it which step of how many this is."""
    global _place
    before, _place = _place, f"[{number}/{total}] "
    try:
        yield
    finally:
        _place = before


@contextmanager
def _beating(description: str, total: int | None, *, quiet: bool) -> Iterator[Advance]:
    """A line at once, then one every `BEAT` seconds."""
    heart = Heartbeat(description, total)
    if quiet:
        yield no_progress
        return
    say(f"{_place}{description} ...")
    stopped = threading.Event()
    thread = threading.Thread(target=heart.beat, args=(stopped,), daemon=True)
    thread.start()
    try:
        yield heart.advance
    finally:
        stopped.set()
        thread.join()


@contextmanager
def spinner(description: str, *, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Show that a step without countable units goes on; it leaves nothing behind on the terminal.

    Args:
        description: what is being done.
        quiet: show nothing.

    Yields:
        A function that shows a note behind the description.
    """
    out = console(stderr=True)
    if quiet or not out.is_terminal:
        with _beating(description, None, quiet=quiet):
            yield lambda note: None
        return
    with _shown(out.status(Text(f"{description} ..."))) as status:

        def show(note: str) -> None:
            with suppress(Exception):  # also where the terminal is gone, and nothing is shown
                status.update(Text(f"{description} ... {note}"[: out.width - 4], overflow="ellipsis"))

        yield show


@contextmanager
def _shown(display: Any) -> Iterator[Any]:
    """A display of rich while a block runs: what fails in showing it does not end what it shows."""
    started = False
    with suppress(Exception):
        display.start()
        started = True
    try:
        yield display if started else None
    finally:
        with suppress(Exception):
            display.stop()


@contextmanager
def drawn(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Draw results that are written already: where that fails it is said, and they are kept."""
    try:
        yield
    except Exception as error:
        say(f"no {what}: {' '.join(str(error).split()) or type(error).__name__}", quiet=quiet, style="yellow")


def say(text: str, *, quiet: bool = False, style: str = "") -> None:
    """Print one line on stderr, or nothing; where stderr is closed or full, the work goes on without it."""
    if not quiet:
        with suppress(Exception):
            console(stderr=True, soft_wrap=True).print(text, style=style)


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        """Where rich would end the process and close stdout, also for a stderr that nobody reads any more."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class _Display(Progress):
    def refresh(self) -> None:
        with suppress(Exception):  # tasks are added and updated whether or not they can be drawn
            super().refresh()


class _NoteColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields.get("note", ""), style="dim")


def quiet_libraries() -> None:
    """Errors of the libraries stay; their notices would break the progress bars."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # GPT-2's Conv1D; PEFT corrects it
    warnings.filterwarnings("ignore", message="Could not find a config file in")  # said of a GGUF base at every save
    # It announces an optional kernel that no command here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
