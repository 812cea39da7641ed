"""results.json of a pretraining run: every arm's figures and the paired comparisons, from the stored cells alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from preskip.evaluate.stats import compare_arms, measured_power, summarise
from preskip.pretrain.config import PretrainConfig
from preskip.rundir import SCHEMA_VERSION, RunDirectory, read_jsonl

# What an arm's results repeat from run.json.
ARM_FACTS = (
    "budget",
    "matched",
    "deviation",
    "parameters",
    "non_embedding",
    "forward_flops_per_token",
    "training_flops",
    "steps",
    "tokens",
    "base_dtype",
    "adapter_dtype",
    "compute_dtype",
    "attn_implementation",
)
MEANS = ("final_training_loss", "final_eval_loss", "seconds_per_step", "tokens_per_second", "mfu")


def summarise_run(run: RunDirectory, config: PretrainConfig, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Compute results.json from the cells that are done.

    Args:
        run: the run directory.
        config: its configuration.
        manifest: its run.json, for the sets, the arms and the declared family.

    Returns:
        The evaluation sets, metrics by arm and set, paired comparisons of all arms with verdicts, what they could
        resolve, and the loss on development documents while training, by arm and seed.
    """
    cells = {arm: {seed: run.cell(arm, seed) for seed in config.seeds} for arm in config.arms}
    done = {arm: {seed: cell for seed, cell in by_seed.items() if cell.is_done} for arm, by_seed in cells.items()}
    done = {arm: by_seed for arm, by_seed in done.items() if by_seed}
    loaded = {arm: {seed: cell.load() for seed, cell in by_seed.items()} for arm, by_seed in done.items()}
    items = {arm: {seed: rows for seed, (_, rows) in by_seed.items()} for arm, by_seed in loaded.items()}
    family = manifest["family"]
    comparisons = compare_arms(items, family) if len(items) > 1 else []
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "pretrain",
        "sets": manifest["sets"],
        "arms": {
            arm: _arm_results([summary for summary, _ in by_seed.values()], items[arm], manifest["arms"][arm])
            for arm, by_seed in loaded.items()
        },
        "family": family,
        "comparisons": comparisons,
        "power": measured_power(comparisons, family),
        "depth": {},
        "curves": {
            arm: {str(seed): _curve(read_jsonl(cell.train_log)) for seed, cell in by_seed.items()}
            for arm, by_seed in done.items()
        },
    }


def _curve(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations while training: step, tokens read by then, nats per token."""
    read = np.cumsum([row["tokens"] for row in rows])
    return [
        {"step": row["step"], "tokens": int(tokens), "eval_loss": row["eval_loss"]}
        for row, tokens in zip(rows, read, strict=True)
        if "eval_loss" in row
    ]


def _arm_results(
    summaries: Sequence[Mapping[str, Any]], items: dict[int, list[dict[str, Any]]], facts: Mapping[str, Any]
) -> dict[str, Any]:
    def mean(key: str) -> float | None:
        values = [summary[key] for summary in summaries if summary[key] is not None]
        return float(np.mean(values)) if values else None

    return {
        "trainable_parameters": summaries[0]["trainable_parameters"],
        **{key: facts[key] for key in ARM_FACTS},
        "learning_rate": summaries[0]["learning_rate"],
        "seeds": [summary["seed"] for summary in summaries],
        "metrics": summarise(items),
        **{key: mean(key) for key in MEANS},
        "peak_memory_bytes": max(summary["peak_memory_bytes"] for summary in summaries),
    }
