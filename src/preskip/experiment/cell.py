"""One cell of a run: one arm trained with one seed, and scored on everything. It needs the run directory alone."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from preskip.experiment.frozen import Frozen
from preskip.experiment.heldout import Config
from preskip.experiment.prepared import Prepared
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.experiment.scratch import Scratch
from preskip.progress import say
from preskip.runs.directory import RunDirectory
from preskip.runs.environment import hardware_name
from preskip.runs.files import clear_disk_errors, write_json, write_jsonl
from preskip.runs.schema import CellSummary, StepRow
from preskip.runs.stored import failed_notes
from preskip.train.memory import peak_memory
from preskip.train.scratch import missing_trackers

# By the command that makes the run; a run.json without a kind is of the first.
KINDS: dict[str, type[Prepared]] = {"probe": Frozen, "pretrain": Scratch}


def kind_of(run: RunDirectory) -> str:
    """The command that has made a run."""
    return run.manifest.get("kind", "probe")


def usable_options(kind: str, stored: dict[str, Any]) -> Config:
    """The options of a run as they can be followed here: without missing trackers, which change no result.

    Args:
        kind: of the run, in `KINDS`.
        stored: its options, as run.json has them.
    """
    config: Config = KINDS[kind].options.from_json(stored)
    if isinstance(config, PretrainConfig):
        missing = missing_trackers(config.report_to)
        config = replace(config, report_to=tuple(name for name in config.report_to if name not in missing) or ("none",))
    return config


@lru_cache(maxsize=1)
def opened(path: Path) -> Prepared:
    """What the cells of the run at a path share; it stays in memory for the next cell."""
    run = RunDirectory.open(path)
    kind = kind_of(run)
    return KINDS[kind].open(run, usable_options(kind, run.manifest["config"]))


def run_cell(run: Path | Prepared, arm: str, seed: int) -> CellSummary:
    """Train and score one arm with one seed, and store what came out; `cell.json` is written last.

    A cell that is done is not repeated, an interrupted one goes on from its last checkpoint. To be called from any
    process that sees the run directory; no two may run the same cell at once.

    Args:
        run: a run directory that `finish_run` has prepared, or what its cells share.
        arm: name of the arm.
        seed: of initialisation, data order and dropout.

    Returns:
        The content of cell.json.

    Raises:
        PreskipError: a loss that is not finite, damaged data, or a full disk.
    """
    prepared = run if isinstance(run, Prepared) else opened(Path(run).resolve())
    config, cell = prepared.config, prepared.run.cell(arm, seed)
    if cell.is_done:
        return cell.load()[0]
    trains = prepared.arms[arm].trains
    label = f"{arm} seed {seed}" if trains and len(config.seeds) > 1 else arm
    rows: list[StepRow] = []
    started = time.perf_counter()
    with clear_disk_errors(cell.folder):
        cell.folder.mkdir(parents=True, exist_ok=True)
    with peak_memory(torch.device(config.device)) as peak, prepared.build(arm, seed) as built:
        if trains:
            rows = prepared.train(built, arm, seed, cell, f"train {label}")
            prepared.save(built, cell)
        parameters = built.parameters
        trained = time.perf_counter()
        notes: list[str] = []
        items = prepared.heldout.score(
            built.model,
            prepared.tokenizer,
            label,
            batch_tokens=config.eval_batch_tokens,
            quiet=prepared.quiet,
            notes=notes,
        )
        measured = prepared.measure(built, label)
        notes += measured.pop("notes", [])
    left = failed_notes(items)  # said as they were scored
    # Of a training that was resumed the steps before count, too; what saving and loading took then is not known.
    train_seconds = max(trained - started, sum(row["seconds"] for row in rows))
    summary: Any = {
        "arm": arm,
        "seed": seed,
        "trainable_parameters": parameters,
        "learning_rate": prepared.rate(arm, seed),
        **prepared.summarise(arm, rows),
        "peak_memory_bytes": peak.bytes,
        "hardware": hardware_name(config.device),
        "train_seconds": round(train_seconds, 2),
        "evaluate_seconds": round(time.perf_counter() - trained, 2),
        **measured,
        **({"notes": notes + left} if notes or left else {}),
    }
    if "declaration" in (manifest := prepared.run.manifest):
        summary["declaration"] = manifest["declaration"]["sha256"]
    for note in notes:
        say(f"{label}: {note}", quiet=prepared.quiet)
    write_jsonl(cell.items, items)
    write_json(cell.summary, summary)
    shutil.rmtree(cell.checkpoints, ignore_errors=True)
    return summary
