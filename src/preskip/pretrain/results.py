"""results.json of a pretraining run: every arm's figures and the paired comparisons, from the stored cells alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from preskip.analysis.depth_results import by_seed, drop_documents, trends
from preskip.evaluate.arm_results import arm_results, finished_cells
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.runs.directory import SCHEMA_VERSION, RunDirectory
from preskip.runs.files import read_jsonl
from preskip.stats import compare_arms, measured_power

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
    summaries, items = finished_cells(run, config.arms, config.seeds)
    family = manifest["family"]
    comparisons = compare_arms(items, family, manifest["sets"]) if len(items) > 1 else []
    results = {
        "schema_version": SCHEMA_VERSION,
        "kind": "pretrain",
        "sets": manifest["sets"],
        "arms": {
            arm: arm_results(found, items[arm], manifest["arms"][arm], facts_kept=ARM_FACTS, means=MEANS)
            for arm, found in summaries.items()
        },
        "family": family,
        "comparisons": comparisons,
        "power": measured_power(comparisons, family),
        "depth": by_seed(summaries, "depth"),
        "curves": {
            arm: {str(seed): _curve(read_jsonl(run.cell(arm, seed).train_log)) for seed in seeds}
            for arm, seeds in items.items()
        },
    }
    results |= trends(results)
    drop_documents(results)
    return results


def _curve(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations while training: step, tokens read by then, nats per token."""
    read = np.cumsum([row["tokens"] for row in rows])
    return [
        {"step": row["step"], "tokens": int(tokens), "eval_loss": row["eval_loss"]}
        for row, tokens in zip(rows, read, strict=True)
        if "eval_loss" in row
    ]
