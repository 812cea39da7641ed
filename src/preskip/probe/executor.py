"""Where the cells of a run and its searches for learning rates are computed: in this process, or on a Ray cluster.

Both write the same files into the run directory, which the machines of a cluster must share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from preskip.arms import ARMS, Arm
from preskip.experiment.probe_options import ProbeConfig
from preskip.probe.bench import Bench, prepare
from preskip.probe.cells import run_cell
from preskip.probe.search import search_rate
from preskip.progress import progress_bar
from preskip.runs.directory import RunDirectory
from preskip.train.cluster import RayPool


class LocalExecutor:
    """Computes one after the other in this process, and shares what was prepared."""

    def search(
        self, run: RunDirectory, bench: Bench, arms: Sequence[Arm], base: list[dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """The search for the learning rate of each arm (`search_rate`), in their order."""
        for arm in arms:
            yield search_rate(bench, arm, run.search / arm.name, base)

    def cells(self, run: RunDirectory, bench: Bench, jobs: Sequence[tuple[Arm, int]]) -> Iterator[dict[str, Any]]:
        """Train and score arms with seeds (`run_cell`); the summaries, in any order."""
        for arm, seed in jobs:
            yield run_cell(bench, arm, seed, run.cell(arm.name, seed))

    def close(self) -> None:
        """Nothing to end."""


class RayExecutor(LocalExecutor):
    """Computes every cell and every search as a task of its own on a Ray cluster; see `RayPool`.

    Args:
        address: of a cluster; None starts one on this machine.
        device: "cpu" or "cuda".

    Raises:
        PreskipError: the cluster cannot be had.
    """

    def __init__(self, address: str | None, device: str) -> None:
        self.pool = RayPool(address, device)

    def search(self, run, bench, arms, base):
        """As `LocalExecutor.search`, one task per arm."""
        calls = [(_search_task, arm.name, base) for arm in arms]
        found = dict(self._outcomes(run, bench, "searches", calls))
        yield from (found[index] for index in range(len(calls)))

    def cells(self, run, bench, jobs):
        """As `LocalExecutor.cells`, one task per arm and seed."""
        calls = [(_cell_task, arm.name, seed, bench.rates) for arm, seed in jobs]
        for _, summary in self._outcomes(run, bench, "cells", calls):
            yield summary

    def close(self) -> None:
        """Leave the cluster, and end it if it was started here."""
        self.pool.close()

    def _outcomes(
        self, run: RunDirectory, bench: Bench, label: str, calls: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, Any]]:
        path, names = str(run.path.resolve()), [f"arm {call[1]}" for call in calls]
        with progress_bar(f"{label} on Ray", len(calls), quiet=bench.quiet) as advance:
            tasks = self.pool.outcomes(_run_task, [(path, *call) for call in calls], names)
            for count, (index, result) in enumerate(tasks, 1):
                advance(count, names[index])
                yield index, result


def open_executor(kind: str, address: str | None, device: str) -> LocalExecutor:
    """An executor by name, to be closed after use.

    Args:
        kind: "local" or "ray".
        address: of the Ray cluster; None starts one on this machine.
        device: "cpu" or "cuda".

    Raises:
        PreskipError: the cluster cannot be had.
    """
    return RayExecutor(address, device) if kind == "ray" else LocalExecutor()


def _run_task(path: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """In a worker: one search or cell of the run in `path`."""
    return function(RunDirectory.open(Path(path)), _prepared(path), *arguments)


@lru_cache(maxsize=1)
def _prepared(path: str) -> Bench:
    """In a worker: what the tasks of one run share, prepared at the first."""
    manifest = RunDirectory.open(Path(path)).manifest
    return prepare(ProbeConfig.from_json(manifest["config"]), Path(manifest["directory"]), True)[0]


def _search_task(run: RunDirectory, bench: Bench, name: str, base: list[dict[str, Any]]) -> dict[str, Any]:
    return search_rate(bench, ARMS[name], run.search / name, base)


def _cell_task(run: RunDirectory, bench: Bench, name: str, seed: int, rates: dict[str, float | None]) -> dict[str, Any]:
    bench.rates.update(rates)
    cell = run.cell(name, seed)
    # A worker may be lost between its last file and its answer.
    return cell.load()[0] if cell.is_done else run_cell(bench, ARMS[name], seed, cell)
