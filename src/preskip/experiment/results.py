"""results.json: the figures of every arm and the paired comparisons, from the stored cells alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from preskip.analysis.depth_results import by_seed
from preskip.evaluate.arm_results import arm_results, finished_cells
from preskip.evaluate.paper import COLUMNS, paper_columns
from preskip.evaluate.published import paper_table
from preskip.runs.directory import SCHEMA_VERSION, RunDirectory
from preskip.runs.files import read_json, read_jsonl
from preskip.stats import compare_arms, measured_power

# What an arm's results repeat from run.json, and what they average over its cells, as far as its kind has it.
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


def summarise_run(run: RunDirectory) -> dict[str, Any]:
    """Compute results.json from the cells that are done.

    Args:
        run: with the sets, the arms, the seeds and the declared family in its run.json.

    Returns:
        The evaluation sets, metrics by arm and set, paired comparisons of all arms with verdicts, what they could
        resolve, the depth profiles by arm and seed, and what only one kind of training has: the search for learning
        rates; or the loss on development documents while training.
    """
    manifest = run.manifest
    facts, family = manifest["arms"], manifest["family"]
    summaries, items = finished_cells(run, list(facts), manifest["seeds"])
    comparisons = compare_arms(items, family, manifest["sets"]) if len(items) > 1 else []
    results = {
        "schema_version": SCHEMA_VERSION,
        **({"kind": manifest["kind"]} if "kind" in manifest else {}),
        "sets": manifest["sets"],
        "arms": {
            arm: arm_results(
                found,
                items[arm],
                facts[arm],
                facts_kept=[key for key in ARM_FACTS if key in facts[arm]],
                means=[key for key in MEANS if key in found[0]],
            )
            for arm, found in summaries.items()
        },
        "family": family,
        "comparisons": comparisons,
        "power": measured_power(comparisons, family),
        "depth": by_seed(summaries, "depth"),
    }
    if ablation := by_seed(summaries, "ablation"):
        results["ablation"] = ablation
    caches = {arm: found[0].get("kv_cache_bytes_per_token") for arm, found in summaries.items()}
    if caches.get("none") is not None and caches.get("preskip") is not None:
        results["kv_cache"] = {"base_bytes": caches["none"], "arm_bytes": caches["preskip"], "per": "token"}
    if any(name in COLUMNS for name in manifest["sets"]):
        results["paper"] = {
            "columns": {arm: paper_columns(row for rows in own.values() for row in rows) for arm, own in items.items()},
            "model": manifest["published"],
            "published": paper_table(manifest["published"]),
        }
    searches = {arm: run.search / arm / "search.json" for arm in items}
    if found := {arm: read_json(path) for arm, path in searches.items() if path.is_file()}:
        results["search"] = found
    if manifest.get("kind") == "pretrain":
        results["curves"] = {
            arm: {str(seed): _curve(read_jsonl(run.cell(arm, seed).train_log)) for seed in seeds}
            for arm, seeds in items.items()
        }
    return results


def _curve(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations while training: step, tokens read by then, nats per token."""
    read = np.cumsum([row["tokens"] for row in rows])
    return [
        {"step": row["step"], "tokens": int(tokens), "eval_loss": row["eval_loss"]}
        for row, tokens in zip(rows, read, strict=True)
        if "eval_loss" in row
    ]
