"""What the commands that make a run share: their options, their course, resuming, the end and the page of a run."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar

from preskip.cli.libraries import loading_libraries
from preskip.cli.options import flag
from preskip.errors import DivergedError, LostWorkersError, PreskipError, is_out_of_memory
from preskip.experiment.option_file import configured
from preskip.experiment.parse import parse_seeds
from preskip.progress import console
from preskip.runs.files import is_full_disk

if TYPE_CHECKING:
    from preskip.experiment.options import ExperimentConfig
    from preskip.runs.directory import RunDirectory
    from preskip.runs.schema import Manifest, Results

Written = TypeVar("Written")
# What batch systems and a closed terminal send; Windows has no SIGHUP.
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
# What a run computes lies in files this deep in its folders: cells, trials of the search, controls.
_COMPUTED = ("arms/*/*/*", "search/*", "controls/*")

OptionFile = Annotated[
    Optional[Path],
    flag("Options as YAML or JSON, or another run's run.json; flags override them.", "Output", is_list=True),
]
Workers = Annotated[int, flag("Processes that train arms and seeds side by side.", "Output", hint=int, least=1)]
Executor = Annotated[str, flag("local, or ray: each arm and seed as a task of its own.", "Output")]
RayAddress = Annotated[Optional[str], flag("Ray cluster, e.g. auto. Default: one on this machine.", "Output")]
Out = Annotated[
    Optional[Path], flag("Run directory; must not exist. Default: runs/<time>-<model or arch>-<corpus>.", "Output")
]
Resume = Annotated[Optional[Path], flag("Finish this run, or add --seeds to it; its options are its own.", "Output")]


@dataclass(frozen=True, kw_only=True)
class Course:
    """What differs between the commands.

    Attributes:
        kind: the options.
        announce: lines about a run's configuration, given why it has its dtype.
        show: prints run.json and the results, given the page or None.
        executor, ray_address, workers: where cells are computed, see `preskip.experiment.run.finish_run`.
        show_plans: given the solved arms before anything is trained, unless nothing is to be printed.
    """

    kind: type[ExperimentConfig]
    announce: Callable[[Mapping[str, Any], str], list[str]]
    show: Callable[[Manifest, Results, Path | None], None]
    executor: str = "local"
    ray_address: str | None = None
    workers: int = 1
    show_plans: Callable[[Any], None] | None = None


def make_run(
    course: Course,
    given: Mapping[str, Any],
    *,
    config: Path | None,
    out: Path | None,
    resume: Path | None,
    as_json: bool,
) -> None:
    """Make or finish a run.

    Args:
        course: of the command.
        given: its options on the command line.
        config: file with further ones.
        out: run directory; None names one.
        resume: run to finish; it has its options.
        as_json: print one JSON document, no progress.

    Raises:
        PreskipError: an option is wrong, or anything else that a user can mend.
    """
    from preskip.train.cluster import check_executor
    from preskip.train.distributed import is_main, world_size

    if course.workers > 1 and (course.executor == "ray" or world_size() > 1):
        raise PreskipError("--workers has its own processes: leave out --executor ray, torchrun or accelerate launch")
    if not is_main():
        _follow(course, given, config, resume)
        return
    refused = sorted({*given, *(["config"] if config else []), *(["out"] if out else [])} - {"seeds"})
    if resume is not None and refused:
        raise PreskipError(f"--resume takes every option but --seeds from the run: leave out {', '.join(refused)}")
    check_executor(course.executor, course.ray_address)
    from preskip.experiment.preflight import check_experiment, check_place
    from preskip.progress import say

    asked: Any = None if resume is not None else configured(course.kind, given, config)
    if asked is not None:
        check_experiment(asked)
        places = [out] if out is not None else free_places(default_out(asked.subject, asked.corpus))
        check_place(places[0])
    with loading_libraries(quiet=as_json):
        from preskip.experiment.run import check_command, finish_run, start_run
        from preskip.runs.directory import RunDirectory
        from preskip.runs.environment import resolve_dtype
    if asked is not None:
        run = _started(lambda path: start_run(asked, path, ["preskip", *sys.argv[1:]]), places)
        reason = resolve_dtype(asked.dtype, run.manifest["config"]["device"])[1]
    else:
        run, reason = RunDirectory.open(resume), "as before"  # type: ignore[arg-type]
        if not run.manifest.get("config"):
            raise PreskipError(f"{run.path / 'run.json'} is damaged, it holds no options: begin a new run")
        check_command(run, course.kind.command)
    for line in (*course.announce(run.manifest["config"], reason), f"run {run.path}"):
        say(line, quiet=as_json)
    with kept_for_resuming(run, course.kind.command, is_new=asked is not None):
        results = finish_run(
            run,
            seeds=parse_seeds(given["seeds"]) if resume is not None and "seeds" in given else (),
            quiet=as_json,
            workers=course.workers,
            executor=course.executor,
            ray_address=course.ray_address,
            show_plans=(lambda plans: None) if as_json or course.show_plans is None else course.show_plans,
        )
    page = write_report(run, as_json)
    if as_json:
        print(json.dumps({"run": str(run.path), "report": page and str(page), **results}, indent=1))
    else:
        course.show(run.manifest, results, page)
        for line in (f"run: {run.path}", *([f"report: {page}"] if page else [])):  # last: where to look further
            console().print(line, soft_wrap=True)


def _follow(course: Course, given: Mapping[str, Any], file: Path | None, resume: Path | None) -> None:
    """Another process than the main one of a launch: only takes part in the trainings."""
    from preskip.progress import quiet_libraries

    quiet_libraries()
    from preskip.experiment.run import follow_run
    from preskip.runs.directory import RunDirectory
    from preskip.runs.environment import resolve_device

    try:
        device = RunDirectory.open(resume).manifest["config"]["device"] if resume else None
        device = device or resolve_device(configured(course.kind, given, file).device)
    except PreskipError:
        sys.exit(1)  # the main process says why
    for number in ENDING:  # it has nothing to tidy, and waits where Python sees no signals
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    follow_run(device)


def _started(start: Callable[[Path], RunDirectory], places: Sequence[Path]) -> RunDirectory:
    """The new run, at the first of the places that no other run has taken meanwhile."""
    for path in places[:-1]:
        try:
            return start(path)
        except PreskipError:
            if not path.exists():
                raise
    return start(places[-1])


def free_places(named: Path) -> list[Path]:
    """Where a run may be that was given no place; of two that are started in one second, each finds its own."""
    numbered = [named, *(named.with_name(f"{named.name}-{number}") for number in range(2, 100))]
    return [path for path in numbered if not path.exists()]


def default_out(*names: str) -> Path:
    """`runs/<time>-<name>-<name>`, of names that may be paths or Hub ids."""
    from preskip.data.splits import slug

    time = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / "-".join([time, *(slug(name)[:40].strip("-.") or "run" for name in names)])


@contextmanager
def kept_for_resuming(run: RunDirectory, command: str, *, is_new: bool) -> Iterator[None]:
    """Where a run ends early, say how to finish it, unless it diverged; a new one without anything computed is removed.

    Where memory, the disk or the workers did not last the options were no mistake, and the error names the run: it is
    kept.

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
        lacks = is_full_disk(error) or isinstance(error, LostWorkersError)
        lacks = lacks or (error.__cause__ is not None and is_out_of_memory(error.__cause__))
        if lacks or any(any(run.path.glob(pattern)) for pattern in _COMPUTED):
            if not isinstance(error, DivergedError):  # with the same options it would diverge again
                _hint(run, command)
            raise
        if is_new:
            shutil.rmtree(run.path)
        raise error from None


def _hint(run: RunDirectory, command: str) -> None:
    from preskip.progress import say

    text = f"what is done is kept; finish with: preskip {command} --resume {shlex.quote(str(run.path))}"
    say(text, style="yellow")


def write_report(run: RunDirectory, quiet: bool) -> Path | None:
    """Write the page and the model cards of a run; the results are kept where one of them cannot be written.

    Args:
        run: its directory.
        quiet: no progress, and no hint at what is missing.

    Returns:
        The page, or None where its extra is not installed.
    """
    from preskip.report import build_report, write_cards

    written_or_said(write_cards, run.path, "model cards", quiet)
    return written_or_said(build_report, run.path, "report.html", quiet)


def written_or_said(write: Callable[[Path], Written], folder: Path, what: str, quiet: bool) -> Written | None:
    """What `write` makes of a folder, or None where it cannot: the reason is said, and what is stored stays."""
    from preskip.progress import drawn, spinner

    with drawn(what, quiet=quiet), spinner(f"writing {what}", quiet=quiet):
        return write(folder)
    return None
