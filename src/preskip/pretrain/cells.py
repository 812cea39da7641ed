"""One cell of a run: one arm trained from scratch with one seed, and scored. It needs the run directory alone."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, set_seed

from preskip.analysis.depth import text_profile
from preskip.errors import DivergedError
from preskip.evaluate.texts import score_texts
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.pretrain.arms import Plan
from preskip.pretrain.prepare import Shared, open_shared
from preskip.progress import progress_bar
from preskip.runs.directory import RunDirectory
from preskip.runs.environment import hardware_name
from preskip.runs.files import clear_disk_errors, write_json, write_jsonl
from preskip.train.memory import peak_memory
from preskip.train.scratch import ScratchSettings, train_scratch


def run_cell(run_path: Path, arm: str, seed: int, *, quiet: bool = True) -> dict[str, Any]:
    """Train and score one arm with one seed, and store what came out; `cell.json` is written last.

    A cell that is done is not repeated, an interrupted one goes on from its last checkpoint. To be called from any
    process that sees the run directory; no two may run the same cell at once.

    Args:
        run_path: a run directory that `preskip.pretrain.run` has prepared.
        arm: name of the arm.
        seed: of initialisation, data order and dropout.
        quiet: no progress.

    Returns:
        The content of cell.json.

    Raises:
        PreskipError: a loss that is not finite, damaged data, or a full disk.
    """
    run = RunDirectory.open(Path(run_path))
    cell = run.cell(arm, seed)
    if cell.is_done:
        return cell.load()[0]
    shared = _shared(run.path.resolve())
    config, plan = shared.config, shared.plans[arm]
    label = arm if len(config.seeds) == 1 else f"{arm} seed {seed}"
    started = time.perf_counter()
    with clear_disk_errors(cell.folder):
        cell.folder.mkdir(parents=True, exist_ok=True)
    with peak_memory(torch.device(config.device)) as peak:
        model, rows = _train(run, shared, arm, seed, label, quiet)
        with clear_disk_errors(cell.folder):
            model.config.use_cache = True  # type: ignore[union-attr]  # Trainer has turned it off
            model.save_pretrained(cell.folder / "model")  # type: ignore[operator]
            shared.tokenizer.save_pretrained(cell.folder / "model")
        trained = time.perf_counter()
        items = _score(shared, model, label, quiet)
        depth = text_profile(model, shared.texts[0])
    seconds = [row["seconds"] / config.log_steps for row in rows]
    evaluated = [row["eval_loss"] for row in rows if "eval_loss" in row]
    summary: dict[str, Any] = {
        "arm": arm,
        "seed": seed,
        "trainable_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "learning_rate": config.rate(arm),
        "steps": plan.steps,
        "tokens": plan.tokens,
        "final_training_loss": float(np.mean([row["loss"] for row in rows[-max(1, len(rows) // 20) :]])),
        "final_eval_loss": evaluated[-1] if evaluated else None,
        "seconds_per_step": float(np.median(seconds)),
        "tokens_per_second": float(np.median([row["tokens_per_second"] for row in rows])),
        "mfu": float(np.median([row["mfu"] for row in rows])) if "mfu" in rows[-1] else None,
        "peak_memory_bytes": peak.bytes,
        "hardware": hardware_name(config.device),
        "train_seconds": round(trained - started, 2),
        "evaluate_seconds": round(time.perf_counter() - trained, 2),
        "depth": depth,
    }
    write_jsonl(cell.items, items)
    write_json(cell.summary, summary)
    shutil.rmtree(cell.checkpoints, ignore_errors=True)
    return summary


def follow_cell(run_path: Path, arm: str, seed: int) -> None:
    """Take part in the training of a cell whose `run_cell` another process of the launch calls."""
    run = RunDirectory.open(run_path)
    with suppress(DivergedError):  # the leader tells of it
        _train(run, _shared(run.path), arm, seed, "", True)


def _train(
    run: RunDirectory, shared: Shared, arm: str, seed: int, label: str, quiet: bool
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The trained model of a cell and the rows of its log."""
    plan, cell = shared.plans[arm], run.cell(arm, seed)
    settings = training_settings(shared.config, plan, seed, peak_flops=run.manifest.get("peak_flops"))
    model = build_model(shared.config, plan, seed)
    with progress_bar(f"train {label}", plan.steps, quiet=quiet) as advance:
        rows = train_scratch(
            model,
            shared.blocks,
            settings,
            arm=arm,
            checkpoints=cell.checkpoints,
            log=cell.train_log,
            evaluation=shared.development,
            advance=advance,
        )
    return model, rows


def build_model(config: PretrainConfig, plan: Plan, seed: int) -> nn.Module:
    """A freshly initialised model in fp32; the base's weights are the same for a seed with and without the branch."""
    set_seed(seed)
    options = {} if config.attn_implementation is None else {"attn_implementation": config.attn_implementation}
    model = AutoModelForCausalLM.from_config(plan.config, dtype=torch.float32, **options)
    return model.to(config.device)


def training_settings(
    config: PretrainConfig, plan: Plan, seed: int, *, peak_flops: float | None = None
) -> ScratchSettings:
    """How an arm of a run is trained with a seed."""
    return ScratchSettings(
        steps=plan.steps,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch,
        learning_rate=config.rate(plan.name),
        warmup_steps=config.warmup(plan.steps),
        seed=seed,
        final_rate=config.final_rate,
        weight_decay=config.weight_decay,
        beta2=config.beta2,
        max_grad_norm=config.max_grad_norm,
        branch_rate_factor=config.branch_rate_factor,
        dtype=config.dtype,
        compile=config.compile,
        gradient_checkpointing=config.gradient_checkpointing,
        log_steps=config.log_steps,
        eval_steps=config.eval_steps,
        save_steps=config.save_steps,
        keep_checkpoints=config.keep_checkpoints,
        report_to=config.report_to,
        peak_flops=peak_flops,
    )


@lru_cache(maxsize=1)
def _shared(run_path: Path) -> Shared:
    return open_shared(RunDirectory.open(run_path))


def _score(shared: Shared, model: nn.Module, label: str, quiet: bool) -> list[dict[str, Any]]:
    model.eval()
    windows = sum(len(text.windows) for text in shared.texts)
    with progress_bar(f"evaluate {label}", windows, quiet=quiet) as advance:
        return score_texts(
            model, shared.texts, shared.tokenizer, batch_tokens=shared.config.eval_batch_tokens, advance=advance
        )
