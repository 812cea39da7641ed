"""Reading a run directory for its report: run.json, results.json and the training logs, nothing else."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from preskip.errors import PreskipError, one_line
from preskip.runs.directory import RunDirectory
from preskip.runs.files import read_jsonl
from preskip.runs.schema import SCHEMA_VERSION, Manifest, Results, check_version


class Curve(NamedTuple):
    """The training log of one arm and seed: lines with step and loss (None where it was not finite)."""

    arm: str
    seed: str
    lines: list[dict[str, Any]]


def load_run(run: Path) -> tuple[Manifest, Results]:
    """run.json and results.json; see `load_json`."""
    return load_json(run / "run.json"), load_json(run / "results.json")


def load_json(path: Path) -> Any:
    """Read run.json or results.json.

    Raises:
        PreskipError: the file is missing, damaged, not finite somewhere, or of another schema version.
    """
    if not path.parent.is_dir():
        raise PreskipError(f"{path.parent} is not a directory: give a run directory of `preskip probe` or `pretrain`")
    if not (path.parent / "run.json").is_file():
        raise PreskipError(f"{path.parent} holds no run.json: give a run directory of `preskip probe` or `pretrain`")
    remedy = f"finish the run with `{resume_command(path.parent)}`"
    return load_object(path, SCHEMA_VERSION, f"{remedy}, or give another run directory", remedy)


def resume_command(run: Path) -> str:
    """What finishes a run, by the kind that run.json states as far as it can be read."""
    try:
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        record = None
    kind = record.get("kind") if isinstance(record, dict) else None
    return f"preskip {kind or 'probe'} --resume {shlex.quote(str(run))}"


def load_object(path: Path, version: int, missing: str, damaged: str | None = None) -> Any:
    """Read a JSON object that states its schema version.

    Args:
        path: the file.
        version: the schema version that this preskip reads.
        missing: what to do when the file is missing.
        damaged: what to do when it is damaged; None for the same.

    Raises:
        PreskipError: the file is missing, damaged, not finite somewhere, or of another schema version.
    """
    damaged = damaged or missing
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise PreskipError(f"{path} is missing: {missing}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PreskipError(f"{path} cannot be read ({one_line(error, 120)}): check the file") from None
    except (ValueError, RecursionError) as error:
        raise PreskipError(f"{path} is not valid JSON ({one_line(error, 120)}): {damaged}") from None
    if not isinstance(value, dict):
        raise PreskipError(f"{path} holds a {type(value).__name__}, not an object: {damaged}")
    check_version(path, value, version)
    return value


@contextmanager
def clear_errors(run: Path, what: str, files: str = "run.json or results.json", remedy: str = "") -> Iterator[None]:
    """Turn what a stored file lacks into one line.

    Args:
        run: the run directory, or the file.
        what: who lacks it, such as "the report needs".
        files: which files; "" where `run` is the file.
        remedy: what to do, after a colon.

    Raises:
        PreskipError: in place of the error; its own kind passes through.
    """
    try:
        yield
    except PreskipError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        where = f"{run}: {files}" if files else str(run)
        raise PreskipError(
            f"{where} lacks what {what} ({type(error).__name__}: {one_line(error, 120)}){remedy}"
        ) from error


def load_curves(run: Path, results: Results) -> list[Curve]:
    """The training log of every arm and seed that the results name; absent logs are left out.

    Raises:
        PreskipError: a log cannot be read or one of its lines is damaged.
    """
    curves = []
    for arm, summary in results["arms"].items():
        for seed in summary["seeds"]:
            log = RunDirectory(run).cell(arm, seed).train_log
            if log.is_file() or log.with_name(f"{log.name}.gz").is_file():
                curves.append(Curve(arm, str(seed), _lines(log)))
    return [curve for curve in curves if curve.lines]


def _lines(log: Path) -> list[dict[str, Any]]:
    try:
        rows = read_jsonl(log)
    except PreskipError as error:
        raise PreskipError(f"{error}: run the arm again, or move the file away to report without it") from None
    with clear_errors(log, "the report needs", ""):
        return [{"step": int(row["step"]), "loss": _finite(row.get("loss"))} for row in rows]


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
