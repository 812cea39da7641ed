"""One cell of a run: one arm trained with one seed, and scored on everything."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from preskip.adapter import PreskipConfig
from preskip.analysis.ablation import ablate, ablation_passes
from preskip.analysis.depth import text_profile
from preskip.arms import ARMS, Arm, ArmContext, Inserted, insert
from preskip.data.blocks import scored_size
from preskip.data.splits import choose
from preskip.errors import DivergedError
from preskip.evaluate.likelihood import last_word_records, score_sequences
from preskip.evaluate.paper import paper_scores
from preskip.evaluate.texts import prepare_texts, score_texts
from preskip.probe.bench import LAST_WORD, Bench
from preskip.progress import progress_bar
from preskip.runs.directory import Cell
from preskip.runs.environment import hardware_name
from preskip.runs.files import clear_disk_errors, sync_tree, write_json, write_jsonl
from preskip.train.frozen import TrainingSettings, train_frozen
from preskip.train.memory import peak_memory

# Held-out documents on whose first window the functional size of the branch is measured.
# Words of each document on which layers are switched off: two passes per layer are costly.
ABLATION_WORDS = 60


def run_cell(bench: Bench, arm: Arm, seed: int, cell: Cell) -> dict[str, Any]:
    """Train and score one arm with one seed, and store what came out; `cell.json` is written last.

    Returns:
        The content of cell.json.

    Raises:
        PreskipError: a loss that is not finite, or a full disk.
    """
    config = bench.config
    label = arm.name if len(config.seeds) == 1 or not arm.trains else f"{arm.name} seed {seed}"
    rows: list[dict[str, Any]] = []
    depth: list[dict[str, Any]] = []
    ablation: list[dict[str, Any]] = []
    started = time.perf_counter()
    with clear_disk_errors(cell.folder):
        cell.folder.mkdir(parents=True, exist_ok=True)
    device = next(bench.base.parameters()).device
    branch = has_branch(arm, bench.context)
    with peak_memory(device) as peak, insert(arm, bench.context, seed) as inserted:
        trainable = inserted.parameters if arm.trains else 0
        if arm.trains:
            rows = train(bench, arm, inserted, seed, folder=cell, label=f"train {label}")
            with clear_disk_errors(cell.adapter):
                shutil.rmtree(cell.adapter, ignore_errors=True)  # half of one, where a process was killed here
                inserted.save(cell.adapter)
                sync_tree(cell.adapter)
        trained = time.perf_counter()
        items = evaluate(bench, inserted.model, label)
        if branch:
            depth = text_profile(bench.base, bench.heldout.texts[0])
            ablation = _ablate(bench, inserted, label) if config.ablation_documents else []
        cache = cache_bytes(inserted.model)
    seconds = [row["seconds"] for row in rows]
    summary = {
        "arm": arm.name,
        "seed": seed,
        "trainable_parameters": trainable,
        "learning_rate": bench.rates[arm.name],
        "steps": len(rows),
        "final_training_loss": rows[-1]["loss"] if rows else None,
        "seconds_per_step": float(np.median(seconds)) if seconds else None,
        "peak_memory_bytes": peak.bytes,
        "hardware": hardware_name(config.device),
        "train_seconds": round(trained - started, 2),
        "evaluate_seconds": round(time.perf_counter() - trained, 2),
        "kv_cache_bytes_per_token": cache,
        "depth": depth,
        "ablation": ablation,
    }
    write_jsonl(cell.items, items)
    write_json(cell.summary, summary)
    shutil.rmtree(cell.checkpoints, ignore_errors=True)
    return summary


def _ablate(bench: Bench, inserted: Inserted, label: str) -> list[dict[str, Any]]:
    """Loss change when one layer's skip or enrichment is switched off, on the beginnings of in-domain documents."""
    config = bench.config
    documents = choose(bench.heldout.texts[0].documents, config.ablation_documents, ABLATION_WORDS, config.split_seed)
    text = prepare_texts("ablation", documents, bench.tokenizer, context_length=config.context_length)
    sizes = [scored_size(document, bench.tokenizer).bytes for document in documents]
    passes = ablation_passes(inserted.model, text.windows, config.eval_batch_tokens)
    with progress_bar(f"ablate {label}", passes, quiet=bench.quiet) as advance:
        return ablate(
            inserted.model, text.windows, text.owners, sizes, batch_tokens=config.eval_batch_tokens, advance=advance
        )


def has_branch(arm: Arm, context: ArmContext) -> bool:
    """Whether one of the arm's adapters is a Preskip branch; to be asked while the base is untouched."""
    return any(isinstance(config, PreskipConfig) for config in arm.configs(context))


def train(
    bench: Bench,
    arm: Arm,
    inserted: Inserted,
    seed: int,
    *,
    folder: Cell,
    label: str,
    learning_rate: float | None = None,
    steps: int | None = None,
    **control: Any,
) -> list[dict[str, Any]]:
    """Train an inserted arm; see `train_frozen`.

    Args:
        bench: what the run shares.
        arm: which arm.
        inserted: the arm in the model.
        seed: of data order, dropout and initialisation.
        folder: where checkpoints and the log go.
        label: for the progress bar.
        learning_rate: peak; None for the arm's own.
        steps: optimiser steps; None for the run's.
        control: fields of `TrainingSettings` that make it a control.
    """
    config = bench.config
    rate = bench.rates[arm.name] if learning_rate is None else learning_rate
    assert rate is not None
    if bench.crew.leads and control.get("control") != "noise":  # which takes no data, so there is nothing to share
        task = {"arm": arm.name, "seed": seed, "folder": folder, "learning_rate": rate, "steps": steps, **control}
        bench.crew.announce(task)
    settings = TrainingSettings(
        steps=config.steps if steps is None else steps,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch,
        learning_rate=rate,
        seed=seed,
        gradient_checkpointing=config.gradient_checkpointing,
        save_steps=config.save_steps,
        **control,
    )
    with progress_bar(label, settings.steps, quiet=bench.quiet) as advance:
        return train_frozen(
            inserted.model,
            bench.blocks(seed),
            settings,
            arm=arm.name,
            checkpoints=folder.checkpoints,
            log=folder.train_log,
            advance=advance,
        )


def follow(bench: Bench, tasks: Iterable[dict[str, Any]]) -> None:
    """Take part in the trainings that another process leads.

    Args:
        bench: as the other process has it.
        tasks: what that process announces.
    """
    for task in tasks:
        arm, seed = ARMS[task.pop("arm")], task.pop("seed")
        with suppress(DivergedError), insert(arm, bench.context, seed) as inserted:  # the leader tells of it
            train(bench, arm, inserted, seed, label="", **task)


def evaluate(bench: Bench, model: nn.Module, label: str) -> list[dict[str, Any]]:
    """One record per document and item of every evaluation set."""
    heldout, batch_tokens = bench.heldout, bench.config.eval_batch_tokens
    done = 0

    def step(size: int) -> dict[str, Any]:
        """Options of a scoring of `size` sequences, whose progress follows that of those before."""
        nonlocal done
        before, done = done, done + size
        return {"batch_tokens": batch_tokens, "advance": lambda count, note="": advance(before + count, note)}

    sizes = [sum(len(text.windows) for text in heldout.texts), len(heldout.item_windows)]
    sizes += [heldout.suite.size if heldout.suite else 0, len(heldout.paper.windows) if heldout.paper else 0]
    with progress_bar(f"evaluate {label}", sum(sizes), quiet=bench.quiet) as advance:
        records = score_texts(model, heldout.texts, bench.tokenizer, **step(sizes[0]))
        scores = score_sequences(model, heldout.item_windows, **step(sizes[1]))
        records += last_word_records(LAST_WORD, heldout.items, scores)
        if heldout.suite is not None:
            records += heldout.suite.score(model, **step(sizes[2]))
        if heldout.paper is not None:
            records += paper_scores(model, heldout.paper, **step(sizes[3])).records
    return records


@torch.inference_mode()
def cache_bytes(model: nn.Module, tokens: int = 16) -> float | None:
    """Bytes of the K/V cache per token that the model keeps after reading `tokens`; None where it keeps none."""
    ids = torch.arange(tokens, device=next(model.parameters()).device)[None] + 2
    cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    layers = getattr(cache, "layers", None)
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        return None
    held = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held) / tokens
