"""Where the cells of a run and its searches for learning rates are computed: in this process, or on a Ray cluster.

Both write the same files into the run directory, which machines of a cluster must share. A task whose worker is lost is
given to another one, which goes on from the task's last checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from preskip import environment
from preskip.arms import ARMS, Arm
from preskip.errors import PreskipError
from preskip.probe.bench import Bench, prepare
from preskip.probe.cells import run_cell
from preskip.probe.config import ProbeConfig
from preskip.probe.search import search_rate
from preskip.progress import progress_bar
from preskip.rundir import RunDirectory
from preskip.train.distributed import world_size

EXECUTORS = ("local", "ray")
# How often a task whose worker is lost is given to another one.
RETRIES = 3
# Settings of this process that tasks on other machines need, too.
ENVIRONMENT = ("PRESKIP_", "HF_", "TOKENIZERS_")


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
    """Computes every cell and every search as a task of its own on a Ray cluster.

    A task takes as many cores as this process has threads, so that its sums are those of a run without Ray, and a GPU
    where the run is on CUDA.

    Args:
        address: of a cluster (`auto`, `host:port`, `ray://host:port`); None starts one on this machine.
        device: "cpu" or "cuda".

    Raises:
        PreskipError: Ray is not installed, the cluster cannot be reached, or none of its machines has what is needed.
    """

    def __init__(self, address: str | None, device: str) -> None:
        import torch

        self.ray = _import_ray()
        self.device = device
        try:
            if address is None:
                self.ray.init(num_cpus=environment.usable_cores(), include_dashboard=False, **_QUIET)
            else:
                settings = {key: value for key, value in os.environ.items() if key.startswith(ENVIRONMENT)}
                self.ray.init(address=address, runtime_env={"env_vars": settings}, **_QUIET)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise PreskipError(f"no Ray cluster at --ray-address {address}: {reason}") from error
        machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if device == "cuda" and not any(machine.get("GPU", 0) >= 1 for machine in machines):
            self.close()
            raise PreskipError("--executor ray: no machine of the cluster offers a GPU: give --device cpu")
        self.threads = min(torch.get_num_threads(), int(max(machine.get("CPU", 1) for machine in machines)))

    def search(self, run, bench, arms, base):
        """As `LocalExecutor.search`, one task per arm."""
        calls = [(_search_task, arm.name, base) for arm in arms]
        found = dict(self._outcomes(run, bench, "tune", calls))
        yield from (found[index] for index in range(len(calls)))

    def cells(self, run, bench, jobs):
        """As `LocalExecutor.cells`, one task per arm and seed."""
        calls = [(_cell_task, arm.name, seed, bench.rates) for arm, seed in jobs]
        for _, summary in self._outcomes(run, bench, "cells", calls):
            yield summary

    def close(self) -> None:
        """End a cluster that was started here, or leave the other."""
        self.ray.shutdown()

    def _outcomes(
        self, run: RunDirectory, bench: Bench, label: str, calls: Sequence[tuple[Callable[..., Any], ...]]
    ) -> Iterator[tuple[int, Any]]:
        """The index and the result of every call, as they are done."""
        ray = self.ray
        needs = {"num_cpus": self.threads, "num_gpus": int(self.device == "cuda"), "max_retries": RETRIES}
        task = ray.remote(_run_task).options(**needs)
        path = str(run.path.resolve())
        waiting = {task.remote(path, self.threads, *call): index for index, call in enumerate(calls)}
        try:
            with progress_bar(f"{label} on Ray", len(calls), quiet=bench.quiet) as advance:
                while waiting:
                    (done,), _ = ray.wait(list(waiting), num_returns=1)
                    index = waiting.pop(done)
                    yield index, self._result(done, calls[index])
                    advance(len(calls) - len(waiting), "")
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)

    def _result(self, reference: Any, call: tuple[Any, ...]) -> Any:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self.ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise PreskipError(f"Ray lost the workers of arm {call[1]} {RETRIES + 1} times: {reason}") from error


def open_executor(kind: str, address: str | None, device: str) -> LocalExecutor:
    """An executor by name, to be closed after use.

    Args:
        kind: one of `EXECUTORS`.
        address: of the Ray cluster; None starts one on this machine.
        device: "cpu" or "cuda".

    Raises:
        PreskipError: see `RayExecutor`.
    """
    return RayExecutor(address, device) if kind == "ray" else LocalExecutor()


def check_executor(kind: str, address: str | None) -> None:
    """Refuse, before anything is written, what `open_executor` cannot give.

    Raises:
        PreskipError: the kind is unknown, Ray is not installed, an address is given without Ray, or a launcher has
            started several processes, too.
    """
    if kind not in EXECUTORS:
        raise PreskipError(f"--executor {kind!r} is unknown: choose {' or '.join(EXECUTORS)}")
    if kind == "ray":
        _import_ray()
        if world_size() > 1:
            raise PreskipError("--executor ray starts its own processes: leave out torchrun or accelerate launch")
    elif address is not None:
        raise PreskipError("--ray-address goes with --executor ray")


_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise PreskipError("--executor ray needs Ray, which is not installed: pip install 'preskip[ray]'") from None
    return ray


def _run_task(path: str, threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """In a worker: one search or cell of the run in `path`."""
    import torch

    torch.set_num_threads(threads)
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
