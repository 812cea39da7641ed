"""Where the cells of a run and its searches are computed: here, in several processes of this machine, or on Ray.

All write the same files into the run directory, which the machines of a cluster must share. Under a launcher they are
computed here, and each training is shared with the other processes (`preskip.train.distributed.Crew`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from preskip.errors import LostWorkersError
from preskip.experiment.cell import opened
from preskip.experiment.prepared import Prepared
from preskip.experiment.worker import set_up
from preskip.progress import placed, say
from preskip.runs import environment
from preskip.train.cluster import RayPool

# (what, function, calls, names): index and result of function(prepared, *call) for every call, as they are done.
Execute = Callable[[str, Callable[..., Any], Sequence[tuple[Any, ...]], Sequence[str]], Iterator[tuple[int, Any]]]
# The same for function(*call), in other processes.
Outcomes = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]], Sequence[str]], Iterator[tuple[int, Any]]]


@contextmanager
def open_executor(
    prepared: Prepared,
    *,
    workers: int = 1,
    kind: str = "local",
    address: str | None = None,
    done: Callable[[str, int], str] = lambda what, index: "",
) -> Iterator[Execute]:
    """A way to compute what needs a run directory alone, with one line for each that is done.

    Args:
        prepared: what the cells of the run share.
        workers: processes of this machine.
        kind: "local" or "ray".
        address: of the Ray cluster; None starts one on this machine.
        done: told what is done and its index; what it answers ends the line.

    Raises:
        PreskipError: the cluster is unavailable; or, while computing, workers are lost.
    """

    def here(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        for index, call in enumerate(calls):
            with placed(index + 1, len(calls)):
                result = function(prepared, *call)
            yield index, result

    def execute(what: str, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], names: Sequence[str]):
        outcomes: Iterator[tuple[int, Any]]
        if pool is None:
            outcomes = here(function, calls)
        else:
            path = prepared.run.path.resolve()
            outcomes = pool(_in_worker, [(path, function, *call) for call in calls], names)
        for number, (index, result) in enumerate(outcomes, 1):
            left = done(what, index)
            state = "failed" if isinstance(result, str) else "done"
            say(f"{what} {number} of {len(calls)} {state}: {names[index]}{left}", quiet=prepared.quiet)
            yield index, result

    pool: Outcomes | None = None
    if kind == "ray":
        with closing(RayPool(address, prepared.config.device)) as cluster:
            pool = cluster.outcomes
            yield execute
    elif workers > 1:
        with processes(workers) as pool:
            yield execute
    else:
        yield execute


def _in_worker(path: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(opened(path), *arguments)


def threads_of_a_worker(count: int) -> int:
    """Threads that each of `count` processes of this machine computes with."""
    return max(1, environment.usable_cores() // count)


@contextmanager
def processes(count: int) -> Iterator[Outcomes]:
    """`count` processes of this machine, which share its cores.

    Each takes an equal part of the threads. Several threads add in another order than one, so on a CPU the number of
    processes may move the last digits of the results.
    """
    threads = threads_of_a_worker(count)
    # Spawned: a forked process inherits locks of the libraries' threads, and no CUDA.
    with ProcessPoolExecutor(
        count, mp_context=get_context("spawn"), initializer=set_up, initargs=(threads, os.getpid())
    ) as pool:

        def outcomes(
            function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], names: Sequence[str]
        ) -> Iterator[tuple[int, Any]]:
            running = {pool.submit(function, *call): index for index, call in enumerate(calls)}
            for future in as_completed(running):
                yield running[future], future.result()

        try:
            yield outcomes
        except BrokenProcessPool:
            raise LostWorkersError(
                "a worker ended without a word (out of memory?): resume, with fewer --workers if it happens again"
            ) from None
        except BaseException:
            workers = list((pool._processes or {}).values())  # the pool forgets them as it shuts down
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.terminate()
            raise
