"""What results.json says of an arm, from its finished cells; for runs on a frozen model and from scratch alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from preskip.runs.directory import RunDirectory
from preskip.stats import summarise

Summary = dict[str, Any]
Items = list[dict[str, Any]]


def finished_cells(
    run: RunDirectory, arms: Sequence[str], seeds: Sequence[int]
) -> tuple[dict[str, list[Summary]], dict[str, dict[int, Items]]]:
    """The content of cell.json by arm, and of items.jsonl by arm and seed, of the cells that are done.

    Raises:
        PreskipError: a file of one is damaged.
    """
    loaded = {arm: {seed: run.cell(arm, seed).load() for seed in seeds if run.cell(arm, seed).is_done} for arm in arms}
    loaded = {arm: by_seed for arm, by_seed in loaded.items() if by_seed}
    summaries = {arm: [summary for summary, _ in by_seed.values()] for arm, by_seed in loaded.items()}
    return summaries, {arm: {seed: rows for seed, (_, rows) in by_seed.items()} for arm, by_seed in loaded.items()}


def arm_results(
    summaries: Sequence[Summary],
    items: Mapping[int, Items],
    facts: Mapping[str, Any],
    *,
    facts_kept: Sequence[str],
    means: Sequence[str],
) -> dict[str, Any]:
    """One arm's entry of results.json.

    Args:
        summaries: content of cell.json of each seed.
        items: records by seed.
        facts: the arm's entry of run.json.
        facts_kept: keys of `facts` to repeat.
        means: keys of cell.json to average over the seeds; None where no seed has a value.
    """

    def mean(key: str) -> float | None:
        values = [summary[key] for summary in summaries if summary[key] is not None]
        return float(np.mean(values)) if values else None

    return {
        "trainable_parameters": summaries[0]["trainable_parameters"],
        **{key: facts[key] for key in facts_kept},
        "learning_rate": summaries[0]["learning_rate"],
        "seeds": [summary["seed"] for summary in summaries],
        "metrics": summarise(items),
        **{key: mean(key) for key in means},
        "peak_memory_bytes": max(summary["peak_memory_bytes"] for summary in summaries),
    }
