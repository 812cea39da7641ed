"""Ways to compute the cells of a run beyond this machine: all processes of a launch together, or a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from preskip.experiment.pretrain_options import PretrainConfig
from preskip.pretrain.cells import follow_cell, run_cell
from preskip.progress import say
from preskip.runs.directory import RunDirectory
from preskip.train.cluster import RayPool
from preskip.train.distributed import Crew, share_batch

Execute = Callable[[Path, Sequence[tuple[str, int]]], None]


def all_together(quiet: bool) -> Execute:
    """Cells one after the other, each trained by all processes of a launch; this one is the main process.

    Raises:
        PreskipError: when called, the processes cannot share a batch evenly.
    """

    def execute(path: Path, cells: Sequence[tuple[str, int]]) -> None:
        config = PretrainConfig.from_json(RunDirectory.open(path).manifest["config"])
        share_batch(config.batch_size, config.micro_batch)
        crew = Crew(config.device)
        for number, (arm, seed) in enumerate(cells, 1):
            say(f"cell {number} of {len(cells)}: {arm}, seed {seed}", quiet=quiet)
            crew.announce((path.resolve(), arm, seed))
            run_cell(path, arm, seed, quiet=quiet)
        crew.dismiss()

    return execute


def follow_pretrain(device: str) -> None:
    """Take part in the trainings of a run whose main process is another of this launch; that one prints and writes.

    Args:
        device: "cpu" or "cuda", where the models are.
    """
    for cell in Crew(device).tasks():
        follow_cell(*cell)


def on_ray(address: str | None, quiet: bool) -> Execute:
    """Cells as tasks of a Ray cluster, which sees the run directory under the same path.

    Args:
        address: of the cluster; None starts one on this machine.
        quiet: no progress.

    Raises:
        PreskipError: when called, the cluster cannot be had, or the workers of a cell were lost again and again.
    """

    def execute(path: Path, cells: Sequence[tuple[str, int]]) -> None:
        if not cells:
            return
        calls = [(path.resolve(), arm, seed) for arm, seed in cells]
        names = [f"{arm}, seed {seed}" for arm, seed in cells]
        with closing(RayPool(address, RunDirectory.open(path).manifest["config"]["device"])) as pool:
            for number, (index, summary) in enumerate(pool.outcomes(run_cell, calls, names), 1):
                speed = f"{summary['tokens_per_second']:,.0f} tokens/s"
                say(f"cell {number} of {len(cells)} done: {names[index]}, {speed}", quiet=quiet)

    return execute
