"""One attempt at a run: its manifest, its status while it lasts and as it ends, and inputs that must stay the same."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from typing_extensions import Unpack

from preskip.errors import DivergedError, PreskipError, is_out_of_memory, one_line
from preskip.progress import say
from preskip.runs import environment
from preskip.runs.declaration import identity, now
from preskip.runs.directory import RunDirectory
from preskip.runs.schema import SCHEMA_VERSION, Environment, Facts, Manifest, Results, Status
from preskip.version import __version__


def new_run(out: Path, config: Mapping[str, Any], command: Sequence[str], **facts: Unpack[Facts]) -> RunDirectory:
    """Create the run directory of a new run.

    Args:
        out: the run directory; must not exist.
        config: every option; its device and dtype are stored as resolved.
        command: the command line, for the record.
        facts: further entries of run.json.

    Raises:
        PreskipError: the path exists, or the device is not there; nothing has been written then.
    """
    device = environment.resolve_device(config["device"])
    dtype, _ = environment.resolve_dtype(config["dtype"], device)
    manifest: Manifest = {
        "schema_version": SCHEMA_VERSION,
        "preskip_version": __version__,
        **facts,
        "status": "running",
        "created": now(),
        "finished": None,
        "command": list(command),
        "directory": str(Path.cwd()),
        "config": {**config, "dtype": dtype, "device": device},
    }
    return RunDirectory.create(out, manifest)


class Attempt:
    """Seconds by stage of one attempt, and how it ends.

    Attributes:
        seconds: by stage, e.g. "train"; `timings` adds "total".
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run, self.started = run, time.perf_counter()
        self.earlier = run.manifest.get("timings", {})
        self.seconds: dict[str, float] = {}

    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self.started

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds of what is done within, also where it ends early."""
        began = self.elapsed()
        try:
            yield
        finally:
            self.seconds[name] = self.elapsed() - began

    def timings(self) -> dict[str, float]:
        """The seconds of this attempt and of those before it together, by stage."""
        own = self.seconds | {"total": self.elapsed()}
        names = dict.fromkeys((*self.earlier, *own))
        return {name: round(self.earlier.get(name, 0.0) + own.get(name, 0.0), 2) for name in names}

    def finish(self, results: Results) -> None:
        """Record the end, the seconds of all attempts together, and the largest memory of any arm."""
        self.run.update_manifest(
            status="finished",
            finished=now(),
            timings=self.timings(),
            peak_memory_bytes=max(arm["peak_memory_bytes"] for arm in results["arms"].values()),
        )


@contextmanager
def attempt(run: RunDirectory) -> Iterator[Attempt]:
    """Work on a run alone; where that ends early, run.json says "failed", "interrupted" or "diverged", and it can
    be resumed.

    What it took is recorded then, too. A finished run stays finished until its status is set anew.

    Raises:
        PreskipError: another process works on the run, or memory does not suffice.
    """
    with run.lock():
        own = Attempt(run)
        try:
            yield own
        except DivergedError:
            _mark(own, "diverged")
            raise
        except BaseException as error:
            _mark(own, "interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed")
            if not is_out_of_memory(error):
                raise
            raise PreskipError(
                f"out of memory ({one_line(error, 120)}): free some, or begin a new run with --config "
                f"{run.path / 'run.json'} and a lower --micro-batch-size or --eval-batch-tokens, or "
                "--gradient-checkpointing"
            ) from error


def check_same_inputs(run: RunDirectory, facts: Facts, *, is_complete: bool = False) -> None:
    """Cells of other inputs must not be compared with those still to come.

    Args:
        run: with the facts of its first attempt.
        facts: of this one.
        is_complete: no cell is still to come: what an earlier preskip held out of the same texts may be something else.

    Raises:
        PreskipError: a checksum, a revision, an arm, what is held out, or what lm-eval makes of a task, differs, or
            an earlier preskip trained on other blocks.
    """
    parts: tuple[Literal["model", "corpus", "tokenizer"], ...] = ("model", "corpus", "tokenizer")
    for part in parts:
        before, now = run.manifest.get(part), facts.get(part)
        if before and now and (mark := identity(before)) is not None and mark != identity(now):
            name = now.get("name") or now["source"]
            kind = "SHA-256" if before["sha256"] else "revision"
            raise PreskipError(
                f"{part} {name} has changed since this run began (its {kind} was {mark[:12]}...): put the old one "
                "back, or start a new run"
            )
    own = facts.get("tokenizer", {}).get("opening")
    if not is_complete and own is not None and "opening" not in run.manifest.get("tokenizer", {"opening": own}):
        raise PreskipError(
            f"this run began with preskip {run.manifest['preskip_version']}, which left the start token out of the "
            f"blocks it trains on; models that open every text with it are lost without: begin anew with --config "
            f"{run.path / 'run.json'}"
        )
    _check_same_arms(run.manifest, facts)
    for name, described in run.manifest.get("sets", {}).items():
        same = facts["sets"].get(name)
        if described["sha256"] != (same and same["sha256"]):
            raise PreskipError(
                f"the texts of the evaluation set {name} have changed since this run began: put the old ones back (is "
                "PRESKIP_DATA as it was?), or start a new run"
            )
        if not is_complete and same and described.get("bytes", same.get("bytes")) != same.get("bytes"):
            raise PreskipError(
                f"other documents of {name} are held out than when this run began with preskip "
                f"{run.manifest['preskip_version']}: install that one, or start a new run"
            )
        if described.get("lm_eval") != (same and same.get("lm_eval")):
            then: Mapping[str, Any] = run.manifest.get("environment", {})
            raise PreskipError(
                f"lm-eval builds different prompts for {name} than when this run began: reinstall lm-eval "
                f"{then.get('lm_eval', 'of then')}, or start a new run"
            )


def _check_same_arms(before: Manifest, facts: Facts) -> None:
    """Refuse another version of preskip in which an arm is something else; a rate that was searched for is stored."""
    searched = before["config"].get("lr_mode") == "tune"
    for arm, described in facts.get("arms", {}).items():
        stored: Mapping[str, Any] = before.get("arms", {}).get(arm, {})
        for fact in ("learning_rate", "trainable_parameters", "parameters")[searched:]:
            if fact in stored and stored[fact] != described.get(fact):
                mend = "put the old --arch file back, " if fact == "parameters" else ""
                raise PreskipError(
                    f"arm {arm} had {fact.replace('_', ' ')} {stored[fact]} when this run began, and has "
                    f"{described.get(fact)} in preskip {__version__}: {mend}install preskip "
                    f"{before['preskip_version']}, or start a new run"
                )


def note_other_environments(run: RunDirectory, now: Environment, quiet: bool) -> Facts:
    """Warn when the environment changed: what is still to be computed may differ in the last digits.

    Args:
        run: with the environment of its last attempt, and with those of the attempts before it.
        now: that of this one (`preskip.runs.environment.describe`).
        quiet: say nothing.

    Returns:
        {"earlier_environments": the others in which parts of this run may have been computed} for run.json.
    """
    before = run.manifest.get("environment")
    if before is None:
        return {"earlier_environments": []}
    if "preskip" not in before and "preskip" in now:  # a run of before it was recorded
        before = {**before, "preskip": run.manifest["preskip_version"]}
    changed = _changes(before, now)
    if changed:
        say(
            f"parts of this run were computed with {'; '.join(changed)}: last digits may differ from an uninterrupted "
            "run",
            quiet=quiet,
        )
    others: list[Environment] = []
    for known in (*run.manifest.get("earlier_environments", ()), before):
        if all(_changes(known, other) for other in (now, *others)):
            others.append(known)
    return {"earlier_environments": others}


def _changes(before: Environment, now: Environment) -> list[str]:
    """What differs of two environments; the same machine may have a little more or less memory each time."""
    return [
        f"{name} {value}, now {now.get(name)}"
        for name, value in before.items()
        if name != "memory_bytes" and value != now.get(name)
    ]


def _mark(own: Attempt, status: Status) -> None:
    """Record how an attempt ended; where even that cannot be written, the error that ended it matters more."""
    with suppress(PreskipError, OSError):
        if own.run.manifest["status"] != "finished":
            own.run.update_manifest(status=status, timings=own.timings())
