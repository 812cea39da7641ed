"""What the commands that make a run share: where it goes, resuming it, its end and its page."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

from preskip.errors import PreskipError

if TYPE_CHECKING:
    from preskip.runs.directory import RunDirectory

Written = TypeVar("Written")
# What a run computes lies in files this deep in its folders: cells, trials of the search, controls.
_COMPUTED = ("arms/*/*/*", "search/*/*", "controls/*")


def refuse_other_options(context: typer.Context, free: Collection[str]) -> None:
    """`--resume` takes everything from the run: another option beside it would be silently ignored.

    Args:
        context: of the command.
        free: options that say how and where, not what.

    Raises:
        PreskipError: another one was given.
    """
    given = [
        name
        for name in context.params
        if name not in free and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise PreskipError(f"--resume takes every option from the run: leave out {', '.join(sorted(given))}")


def default_out(*names: str) -> Path:
    """`runs/<time>-<name>-<name>`, of names that may be paths or Hub ids."""
    from preskip.data.splits import slug

    time = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / "-".join([time, *(slug(name)[:40].strip("-.") or "run" for name in names)])


@contextmanager
def kept_for_resuming(run: RunDirectory, command: str, *, is_new: bool) -> Iterator[None]:
    """Where a run ends early, say how to finish it; a new one in which nothing was computed is removed.

    Args:
        run: its directory.
        command: the command that resumes it, e.g. "probe".
        is_new: whether this call has made it.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        _hint(run, command)
        raise
    except PreskipError as error:
        if any(any(run.path.glob(pattern)) for pattern in _COMPUTED):
            _hint(run, command)
            raise
        if is_new:
            shutil.rmtree(run.path)
        raise error from None


def _hint(run: RunDirectory, command: str) -> None:
    from rich.console import Console

    text = f"what is done is kept; finish with: preskip {command} --resume {shlex.quote(str(run.path))}"
    Console(stderr=True, soft_wrap=True).print(text, highlight=False, markup=False, style="yellow")


def follow(take_part: Callable[[str], None], device: str, resume: Path | None) -> None:
    """Another process than the main one of a launch: only takes part in the trainings.

    Args:
        take_part: does so, given the device.
        device: as asked for.
        resume: the run, where one is resumed: its own device counts.
    """
    import signal

    from preskip.runs.directory import RunDirectory
    from preskip.runs.environment import resolve_device

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it has nothing to tidy, and waits where Python sees no signals
    take_part(resolve_device(device) if resume is None else RunDirectory.open(resume).manifest["config"]["device"])


def write_report(run: RunDirectory, quiet: bool) -> Path | None:
    """Write the page and the model cards of a run; the results are kept where one of them cannot be written.

    Args:
        run: its directory.
        quiet: no progress, and no hint at what is missing.

    Returns:
        The page, or None where its extra is not installed.
    """
    from preskip.report import build_report, write_cards

    _write(write_cards, run, "model cards", quiet)
    return _write(build_report, run, "report.html", quiet)


def _write(write: Callable[[Path], Written], run: RunDirectory, what: str, quiet: bool) -> Written | None:
    from rich.console import Console

    from preskip.progress import spinner

    try:
        with spinner(f"writing {what}", quiet=quiet):
            return write(run.path)
    except PreskipError as error:
        if not quiet:
            Console(stderr=True, soft_wrap=True).print(f"no {what}: {error}", style="yellow", markup=False)
        return None
