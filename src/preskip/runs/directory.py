"""The run directory: what is in it, atomic writes, the schema version, and finding out what is done.

::

    RUN/run.json                                what was asked for and what it ran on
    RUN/search/none.jsonl                       what the untouched base gets on the development documents
    RUN/search/<arm>/seed-<seed>/search.json    the outcome of the search for this seed's learning rate; written last
    RUN/search/<arm>/seed-<seed>/rung-<r>/<lr>/trial.json   one training of it
    RUN/controls/<control>/<arm>/seed-<s>/      nulls and controls of the depth picture
    RUN/arms/<arm>/seed-<seed>/adapter/         the trained adapter (none for arm `none`), with its card (README.md)
    RUN/arms/<arm>/seed-<seed>/train.jsonl      one line per optimiser step
    RUN/arms/<arm>/seed-<seed>/items.jsonl      one line per evaluated document or last-word item
    RUN/arms/<arm>/seed-<seed>/cell.json        summary of this arm and seed; written last, it marks them as done
    RUN/prefix/                                 states of frozen layers while the run lasts (`preskip.train.prefix`)
    RUN/results.json, RUN/report.html

Every file is written beside its place and then renamed, so that a reader sees the old file or the new one, never half.
One process at a time works on a run (`RunDirectory.lock`); what a killed one left half-written is removed by the next.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from preskip.errors import PreskipError
from preskip.runs.files import TEMPORARY, clear_disk_errors, new_folder, read_json, read_jsonl, write_json
from preskip.runs.schema import SCHEMA_VERSION, CellSummary, Facts, Manifest, Record, Status, check_version

# What marks a folder of a run as done, its checkpoints as no longer needed.
DONE = ("cell.json", "trial.json")


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

    def load(self) -> tuple[CellSummary, list[Record]]:
        """Return the summary and the items of a cell that is done.

        Raises:
            PreskipError: a file is missing or damaged.
        """
        try:
            summary, items = read_json(self.summary), read_jsonl(self.items)
            missing = CellSummary.__required_keys__ - set(summary if isinstance(summary, dict) else ())
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
    def create(cls, path: Path, manifest: Mapping[str, Any]) -> RunDirectory:
        """Make a new run directory with its run.json, complete from the first moment; the schema version is added.

        Raises:
            PreskipError: the path exists, or cannot be written.
        """
        if path.exists() or path.is_symlink():
            raise PreskipError(f"{path} exists already: choose another --out, or finish it with --resume {path}")
        with new_folder(path) as folder:
            write_json(folder / "run.json", {"schema_version": SCHEMA_VERSION, **manifest})
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run.

        Raises:
            PreskipError: there is no run.json, or it has another schema version.
        """
        if not path.is_dir():
            raise PreskipError(f"{path} is not a run directory: it does not exist or is not a folder")
        check_version(path / "run.json", read_json(path / "run.json"))
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
    def manifest(self) -> Manifest:
        """The content of run.json."""
        return read_json(self.path / "run.json")

    def update_manifest(
        self,
        *,
        status: Status | None = None,
        finished: str | None = None,
        config: Mapping[str, Any] | None = None,
        **changes: Unpack[Facts],
    ) -> None:
        """Change fields of run.json atomically; None leaves a field as it is.

        A run with another status than "finished" has no time at which it was finished.
        """
        own = {"status": status, "finished": finished, "config": config}
        ended: dict[str, Any] = {key: value for key, value in own.items() if value is not None}
        if status not in (None, "finished"):
            ended["finished"] = None
        write_json(self.path / "run.json", {**self.manifest, **ended, **changes})

    @property
    def search(self) -> Path:
        """The folder of the search for learning rates."""
        return self.path / "search"

    @property
    def prefix(self) -> Path:
        """The folder of kept states; removed when the run is finished."""
        return self.path / "prefix"

    def search_file(self, arm: str, seed: int | None) -> Path:
        """The outcome of the search for one training seed; None: of one that serves all seeds."""
        return self.search / arm / ("search.json" if seed is None else f"seed-{seed}/search.json")

    def control(self, name: str, arm: str, seed: int) -> Cell:
        """The folder of one null or control of the depth picture."""
        return Cell(self.path / "controls" / name / arm / f"seed-{seed}")

    def cell(self, arm: str, seed: int) -> Cell:
        """The folder of one arm and seed."""
        return Cell(self.path / "arms" / arm / f"seed-{seed}")
