"""results.json: the figures of every arm and the paired comparisons, from the stored cells alone."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from preskip.arms import resolve_arms
from preskip.evaluate.stats import compare, summarise
from preskip.probe.config import ProbeConfig
from preskip.rundir import SCHEMA_VERSION, RunDirectory


def summarise_run(run: RunDirectory, config: ProbeConfig) -> dict[str, Any]:
    """Compute results.json of a run whose cells are all done.

    Args:
        run: the run directory.
        config: its configuration.

    Returns:
        The evaluation's extent, metrics by arm, paired comparisons (each arm against `none`, then the arms against
        each other) and the depth profiles by arm and seed.
    """
    arms = [arm.name for arm in resolve_arms(config.arms)]
    cells = {arm: [run.cell(arm, seed) for seed in config.seeds if run.cell(arm, seed).is_done] for arm in arms}
    loaded = {arm: [cell.load() for cell in cells[arm]] for arm in arms}
    summaries = {arm: [summary for summary, _ in loaded[arm]] for arm in arms}
    items = {arm: [rows for _, rows in loaded[arm]] for arm in arms}
    comparisons = []
    for reference, arm in combinations(arms, 2):
        comparisons += compare(items[arm], items[reference], arm=arm, reference=reference)
    return {
        "schema_version": SCHEMA_VERSION,
        "evaluation": _extent(items[arms[0]][0], config),
        "arms": {arm: _arm_results(summaries[arm], items[arm]) for arm in arms},
        "comparisons": comparisons,
        "depth": {
            arm: {str(summary["seed"]): summary["depth"] for summary in summaries[arm]}
            for arm in arms
            if any(summary["depth"] for summary in summaries[arm])
        },
    }


def _extent(items: list[dict[str, Any]], config: ProbeConfig) -> dict[str, Any]:
    documents = [item for item in items if item["kind"] == "document"]
    return {
        "context_length": config.context_length,
        "stride": config.context_length,
        "documents": len(documents),
        **{unit: sum(document[unit] for document in documents) for unit in ("tokens", "bytes", "words")},
        "last_word_items": len(items) - len(documents),
        "last_word_name": f"last word ({config.corpus.upper() if config.corpus.isidentifier() else config.corpus})",
    }


def _arm_results(summaries: list[dict[str, Any]], items: list[list[dict[str, Any]]]) -> dict[str, Any]:
    def mean(key: str) -> float | None:
        values = [summary[key] for summary in summaries if summary[key] is not None]
        return float(np.mean(values)) if values else None

    return {
        "trainable_parameters": summaries[0]["trainable_parameters"],
        "learning_rate": summaries[0]["learning_rate"],
        "seeds": [summary["seed"] for summary in summaries],
        "metrics": summarise(items),
        "final_training_loss": mean("final_training_loss"),
        "seconds_per_step": mean("seconds_per_step"),
        "peak_memory_bytes": max(summary["peak_memory_bytes"] for summary in summaries),
    }
