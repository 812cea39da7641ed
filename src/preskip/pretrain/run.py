"""A pretraining run from beginning to end: prepare, train and score every cell, compare.

Every arm and seed is one cell (`preskip.pretrain.cells.run_cell`), which needs the run directory alone; who runs the
cells is open: this process, several of this machine, or a cluster.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from preskip import environment
from preskip.errors import PreskipError
from preskip.pretrain.arms import Plan
from preskip.pretrain.cells import run_cell
from preskip.pretrain.config import PretrainConfig
from preskip.pretrain.prepare import prepare
from preskip.pretrain.results import summarise_run
from preskip.progress import say, spinner
from preskip.rundir import RunDirectory, write_json
from preskip.train.scratch import trackers
from preskip.train.speed import measured_peak
from preskip.version import __version__

# Computes the (arm, seed) cells of the run at a path.
Execute = Callable[[Path, Sequence[tuple[str, int]]], None]


def start_pretrain(config: PretrainConfig, out: Path, command: Sequence[str]) -> RunDirectory:
    """Create the run directory of a new run.

    Args:
        config: what to do.
        out: the run directory; must not exist.
        command: the command line, for the record.

    Raises:
        PreskipError: the path exists, or the device or a tracker is not there; nothing has been written then.
    """
    if out.exists():
        raise PreskipError(f"{out} exists already: choose another --out, or finish it with --resume {out}")
    device = environment.resolve_device(config.device)
    dtype, _ = environment.resolve_dtype(config.dtype, device)
    resolved = {"dtype": dtype, "device": device, "report_to": list(trackers(config.report_to)) or ["none"]}
    manifest = {
        "preskip_version": __version__,
        "kind": "pretrain",
        "status": "running",
        "created": _now(),
        "finished": None,
        "command": list(command),
        "directory": str(Path.cwd()),
        "config": config.to_json() | resolved,
    }
    return RunDirectory.create(out, manifest)


def run_pretrain(
    run: RunDirectory,
    *,
    execute: Execute | None = None,
    show_plans: Callable[[dict[str, Plan]], None] = lambda plans: None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Do, or finish, what the run's run.json says.

    Args:
        run: the run directory.
        execute: computes the cells that are not done; None does so one after the other in this process.
        show_plans: given the solved arms before anything is trained.
        quiet: no progress.

    Returns:
        The content of results.json.

    Raises:
        PreskipError: anything a user can mend; the run directory then says "failed" and can be resumed. Or another
            process is working on the run.
    """
    if run.manifest.get("kind") != "pretrain":
        raise PreskipError(f"{run.path} is no run of `preskip pretrain`: resume it with `preskip probe --resume`")
    with run.lock():
        return _run(run, execute, show_plans, quiet)


def _run(
    run: RunDirectory, execute: Execute | None, show_plans: Callable[[dict[str, Plan]], None], quiet: bool
) -> dict[str, Any]:
    config = PretrainConfig.from_json(run.manifest["config"])
    started = time.perf_counter()
    try:
        plans, facts = prepare(run, config, quiet)
        _check_same_inputs(run, facts)
        show_plans(plans)
        if run.manifest.get("peak_flops") is None:
            peak = config.peak_flops or measured_peak(config.device, getattr(torch, config.dtype))
            facts |= {"peak_flops": peak, "peak_flops_source": "as given" if config.peak_flops else "measured matmul"}
        earlier = run.manifest.get("timings", {})
        run.update_manifest(status="running", **facts)
        seconds = {"load": time.perf_counter() - started}
        # Seeds outermost: what is done early can be compared over all arms.
        every = [(arm, seed) for seed in config.seeds for arm in config.arms]
        missing = [(arm, seed) for arm, seed in every if not run.cell(arm, seed).is_done]
        for arm, seed in set(every) - set(missing):
            run.cell(arm, seed).load()  # damaged files are found now, not after hours of training
        (execute or in_this_process(quiet))(run.path, missing)
        summaries = {cell: run.cell(*cell).load()[0] for cell in every}
        seconds["train"] = sum(summaries[cell]["train_seconds"] for cell in missing)
        seconds["evaluate"] = sum(summaries[cell]["evaluate_seconds"] for cell in missing)
        with spinner("comparing the arms", quiet=quiet):
            results = summarise_run(run, config, run.manifest)
        write_json(run.path / "results.json", results)
        seconds["total"] = time.perf_counter() - started
        timings = {name: round(earlier.get(name, 0.0) + value, 2) for name, value in seconds.items()}
        peak_bytes = max(arm["peak_memory_bytes"] for arm in results["arms"].values())
        run.update_manifest(status="finished", finished=_now(), timings=timings, peak_memory_bytes=peak_bytes)
    except torch.OutOfMemoryError as error:
        _mark(run, "failed")
        raise PreskipError(
            f"out of memory ({str(error).splitlines()[0]}): lower --micro-batch-size or --eval-batch-tokens, or give "
            "--gradient-checkpointing"
        ) from error
    except BaseException as error:
        _mark(run, "interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed")
        raise
    return results


def in_this_process(quiet: bool) -> Execute:
    """Cells one after the other."""

    def execute(path: Path, cells: Sequence[tuple[str, int]]) -> None:
        for number, (arm, seed) in enumerate(cells, 1):
            say(f"cell {number} of {len(cells)}: {arm}, seed {seed}", quiet=quiet)
            run_cell(path, arm, seed, quiet=quiet)

    return execute


def in_processes(count: int, quiet: bool) -> Execute:
    """Cells side by side in `count` processes of this machine, which share its cores.

    Each takes an equal part of the threads. Several threads add in another order than one, so on a CPU the number of
    processes may move the last digits of the results.
    """

    def execute(path: Path, cells: Sequence[tuple[str, int]]) -> None:
        threads = max(1, environment.usable_cores() // count)
        # Spawned: a forked process inherits locks of the libraries' threads, and no CUDA.
        with ProcessPoolExecutor(
            count, mp_context=get_context("spawn"), initializer=_set_up, initargs=(threads, os.getpid())
        ) as pool:
            running = {pool.submit(run_cell, path, arm, seed): (arm, seed) for arm, seed in cells}
            try:
                for number, future in enumerate(as_completed(running), 1):
                    summary = future.result()
                    arm, seed = running[future]
                    say(
                        f"cell {number} of {len(cells)} done: {arm}, seed {seed}, evaluation loss "
                        f"{summary['final_eval_loss'] or summary['final_training_loss']:.4f}, "
                        f"{summary['tokens_per_second']:,.0f} tokens/s",
                        quiet=quiet,
                    )
            except BrokenProcessPool:
                raise PreskipError(
                    "a worker ended without a word (out of memory?): resume, with fewer --workers if it happens again"
                ) from None
            except BaseException:
                workers = list((pool._processes or {}).values())  # the pool forgets them as it shuts down
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in workers:
                    worker.terminate()
                raise

    return execute


def _set_up(threads: int, parent: int) -> None:
    """A worker's share of the cores; the libraries' notices off the terminal; its end where the run's process dies."""
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)

    def watch() -> None:
        # A run that was killed can be resumed at once: nobody else may be training its cells then.
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _mark(run: RunDirectory, status: str) -> None:
    """Record how a run ended; where even that cannot be written, the error that ended it matters more."""
    with suppress(PreskipError):
        run.update_manifest(status=status)


def _check_same_inputs(run: RunDirectory, facts: dict[str, Any]) -> None:
    """Cells of other texts or another architecture must not be compared with those still to come."""
    for part in ("model", "corpus", "tokenizer"):
        before = run.manifest.get(part, {}).get("sha256")
        if before is not None and before != facts[part]["sha256"]:
            raise PreskipError(
                f"the {part} has changed since this run began (its SHA-256 was {before[:12]}...): put the old one "
                "back, or start a new run"
            )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
