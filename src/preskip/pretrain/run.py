"""A pretraining run from beginning to end: prepare, train and score every cell, compare.

Every arm and seed is one cell (`preskip.pretrain.cells.run_cell`), which needs the run directory alone; who runs the
cells is open: this process, several of this machine, or a cluster.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from preskip.errors import PreskipError
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.pretrain.arms import Plan
from preskip.pretrain.cells import run_cell
from preskip.pretrain.prepare import prepare
from preskip.pretrain.results import summarise_run
from preskip.progress import quiet_libraries, say, spinner
from preskip.runs import environment
from preskip.runs.attempt import attempt, check_same_inputs, new_run, note_other_environments
from preskip.runs.directory import RunDirectory
from preskip.runs.files import write_json
from preskip.train.scratch import trackers
from preskip.train.speed import measured_peak

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
    stored = config.to_json() | {"report_to": list(trackers(config.report_to)) or ["none"]}
    return new_run(out, stored, command, kind="pretrain")


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
    config = PretrainConfig.from_json(run.manifest["config"])
    with attempt(run) as now:
        plans, facts = prepare(run, config, quiet)
        check_same_inputs(run, facts, ("model", "corpus", "tokenizer"))
        facts["family"] = run.manifest.get("family", facts["family"])  # declared once, before any result
        facts |= note_other_environments(run, facts["environment"], quiet)
        show_plans(plans)
        if run.manifest.get("peak_flops") is None:
            peak = config.peak_flops or measured_peak(config.device, getattr(torch, config.dtype))
            facts |= {"peak_flops": peak, "peak_flops_source": "as given" if config.peak_flops else "measured matmul"}
        run.update_manifest(status="running", **facts)
        now.seconds["load"] = now.elapsed()
        # Seeds outermost: what is done early can be compared over all arms.
        every = [(arm, seed) for seed in config.seeds for arm in config.arms]
        missing = [(arm, seed) for arm, seed in every if not run.cell(arm, seed).is_done]
        for arm, seed in set(every) - set(missing):
            run.cell(arm, seed).load()  # damaged files are found now, not after hours of training
        (execute or in_this_process(quiet))(run.path, missing)
        summaries = [run.cell(*cell).load()[0] for cell in missing]
        now.seconds["train"] = sum(summary["train_seconds"] for summary in summaries)
        now.seconds["evaluate"] = sum(summary["evaluate_seconds"] for summary in summaries)
        with spinner("comparing the arms", quiet=quiet):
            results = summarise_run(run, config, run.manifest)
        write_json(run.path / "results.json", results)
        now.finish(results)
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
    quiet_libraries()
    torch.set_num_threads(threads)

    def watch() -> None:
        # A run that was killed can be resumed at once: nobody else may be training its cells then.
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
