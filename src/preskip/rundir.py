"""The run directory: what is in it, atomic writes, the schema version, and finding out what is done.

::

    RUN/run.json                                what was asked for and what it ran on
    RUN/search/<arm>/rung-<r>/<lr>/trial.json   one training of the search for a learning rate
    RUN/search/<arm>/search.json                its outcome; written last
    RUN/controls/<control>/<arm>/seed-<s>/      nulls and controls of the depth picture
    RUN/arms/<arm>/seed-<seed>/adapter/         the trained adapter (none for arm `none`), with its card (README.md)
    RUN/arms/<arm>/seed-<seed>/train.jsonl      one line per optimiser step
    RUN/arms/<arm>/seed-<seed>/items.jsonl      one line per evaluated document or last-word item
    RUN/arms/<arm>/seed-<seed>/cell.json        summary of this arm and seed; written last, it marks them as done
    RUN/results.json, RUN/report.html

Every file is written beside its place and then renamed, so that a reader sees the old file or the new one, never half.
One process at a time works on a run (`RunDirectory.lock`); what a killed one left half-written is removed by the next.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preskip.errors import PreskipError

SCHEMA_VERSION = 2
# Ends the names of files that are being written.
TEMPORARY = ".tmp"
# What marks a folder of a run as done, its checkpoints as no longer needed.
DONE = ("cell.json", "trial.json")
# What the results need of every cell.json.
SUMMARY_FIELDS = {
    "seed",
    "trainable_parameters",
    "learning_rate",
    "final_training_loss",
    "seconds_per_step",
    "peak_memory_bytes",
    "depth",
}


@contextmanager
def clear_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission while writing `path` into one clear line.

    Raises:
        PreskipError: in place of the error; other errors pass through.
    """
    try:
        yield
    except Exception as error:
        if _is_full_disk(error):
            raise PreskipError(f"no space left on the disk while writing {path}: free some and resume") from error
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PreskipError(
                f"{path} cannot be written ({os.strerror(error.errno)}): choose another --out"
            ) from error
        raise


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised in place of, tells of a full disk.

    safetensors raises its own type with the system's words; torch.save a RuntimeError that names its archive writer
    but not the reason, which is a full disk in all but rare cases.
    """
    words = ("inline_container", *(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)))
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step; a crash leaves the old content.

    Raises:
        PreskipError: the disk is full or the place cannot be written; nothing is left behind.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace a file's content in one step, see `write_text`; `mode` is the file's permissions."""
    with clear_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, mode)
            os.replace(temporary, path)
            _sync_folder(path.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def sync_tree(folder: Path) -> None:
    """Bring all files of a folder to the disk, so that a power cut after it cannot take them.

    Raises:
        OSError: the disk is full.
    """
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            _sync_folder(path)
        else:
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no such thing
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value atomically; a NaN or infinity is refused, because JSON has none.

    Raises:
        PreskipError: a number is not finite, or the disk is full.
    """
    try:
        text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise PreskipError(f"{path.name} would hold NaN or infinity: a result is not finite ({error})") from error
    write_text(path, text + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line atomically; see `write_json`."""
    rows = list(rows)
    for number, row in enumerate(rows, 1):
        for key, value in (row | row.get("scores", {})).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise PreskipError(f"{path.name} line {number}: {key} is {value}: a result is not finite")
    write_text(path, "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    """Read one JSON file.

    Raises:
        PreskipError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PreskipError(f"{path} does not exist: is this a run directory?") from None
    except (ValueError, OSError) as error:
        raise PreskipError(f"{path} cannot be read: {error}") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read one JSON object per line.

    Raises:
        PreskipError: the file cannot be read or a line is not a JSON object (its number is given).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PreskipError(f"{path} cannot be read: {error}") from None
    rows = []
    # Not splitlines: a document's id may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise PreskipError(f"{path} line {number} is not a JSON object")
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Cell:
    """The folder of one arm and seed in a run."""

    folder: Path

    @property
    def adapter(self) -> Path:
        """Folder of the trained adapter."""
        return self.folder / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Folder of the trainer's checkpoints; removed once the cell is done."""
        return self.folder / "checkpoints"

    @property
    def train_log(self) -> Path:
        """One line per optimiser step."""
        return self.folder / "train.jsonl"

    @property
    def items(self) -> Path:
        """One line per evaluated item."""
        return self.folder / "items.jsonl"

    @property
    def summary(self) -> Path:
        """The cell's summary, written last."""
        return self.folder / "cell.json"

    @property
    def is_done(self) -> bool:
        """Whether the cell's training and evaluation are complete."""
        return self.summary.is_file()

    def load(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Return the summary and the items of a cell that is done.

        Raises:
            PreskipError: a file is missing or damaged.
        """
        try:
            summary, items = read_json(self.summary), read_jsonl(self.items)
            missing = SUMMARY_FIELDS - set(summary if isinstance(summary, dict) else ())
            if missing:
                raise PreskipError(f"{self.summary} lacks {', '.join(sorted(missing))}")
        except PreskipError as error:
            raise PreskipError(f"{error}; delete {self.folder} and resume to compute it again") from None
        return summary, items


@dataclass(frozen=True)
class RunDirectory:
    """One run's folder."""

    path: Path

    @classmethod
    def create(cls, path: Path, manifest: dict[str, Any]) -> RunDirectory:
        """Make a new run directory with its run.json, complete from the first moment.

        Raises:
            PreskipError: the path exists, or cannot be written.
        """
        if path.exists():
            raise PreskipError(f"{path} exists already: choose another --out, or finish it with --resume {path}")
        with clear_disk_errors(path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
            except (FileExistsError, NotADirectoryError, FileNotFoundError):
                raise PreskipError(f"no folder can be made in {path.parent}: choose another --out") from None
            try:
                write_json(temporary / "run.json", {"schema_version": SCHEMA_VERSION, **manifest})
                temporary.chmod(0o755)
                temporary.rename(path)
            except BaseException as error:
                shutil.rmtree(temporary, ignore_errors=True)
                if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise PreskipError(f"{path} has just been made by another process: choose another --out") from None
                raise
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run.

        Raises:
            PreskipError: there is no run.json, or it has another schema version.
        """
        if not path.is_dir():
            raise PreskipError(f"{path} is not a run directory: it does not exist or is not a folder")
        manifest = read_json(path / "run.json")
        version = manifest.get("schema_version") if isinstance(manifest, dict) else None
        if version != SCHEMA_VERSION:
            raise PreskipError(f"{path} has schema version {version}, this preskip reads {SCHEMA_VERSION}")
        return cls(path)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Work on the run alone, beginning with the removal of what a killed process left behind.

        The lock ends with the process, however it ends.

        Raises:
            PreskipError: another process works on the run.
        """
        from filelock import FileLock, Timeout

        with clear_disk_errors(self.path):
            lock = FileLock(self.path / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise PreskipError(
                    f"another process is working on {self.path}: wait until it has finished, or stop it"
                ) from None
        try:
            self._tidy()
            yield
        finally:
            lock.release()

    def _tidy(self) -> None:
        for path in self.path.rglob(f".*{TEMPORARY}"):
            path.unlink()
        for checkpoints in self.path.rglob("checkpoints"):
            if any((checkpoints.parent / name).is_file() for name in DONE):
                shutil.rmtree(checkpoints, ignore_errors=True)

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of run.json."""
        return read_json(self.path / "run.json")

    def update_manifest(self, **changes: Any) -> None:
        """Change fields of run.json atomically."""
        write_json(self.path / "run.json", {**self.manifest, **changes})

    @property
    def search(self) -> Path:
        """The folder of the search for learning rates."""
        return self.path / "search"

    def control(self, name: str, arm: str, seed: int) -> Cell:
        """The folder of one null or control of the depth picture."""
        return Cell(self.path / "controls" / name / arm / f"seed-{seed}")

    def cell(self, arm: str, seed: int) -> Cell:
        """The folder of one arm and seed."""
        return Cell(self.path / "arms" / arm / f"seed-{seed}")
