"""The branch by layer in results.json, from the stored cells: profiles, and their trends over depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preskip.stats.trends import arm_trends

# Parts of results.json that hold rows by arm, seed and layer.
BY_LAYER = ("depth", "equal_step", "ablation")

Summaries = Mapping[str, Sequence[Mapping[str, Any]]]


def by_seed(summaries: Summaries, part: str) -> dict[str, dict[str, Any]]:
    """The rows of one part of cell.json by arm and seed, of the arms that have any.

    Args:
        summaries: content of cell.json of each seed, by arm.
        part: its key, e.g. "depth".
    """
    found = {
        arm: {str(summary["seed"]): summary[part] for summary in own if summary.get(part)}
        for arm, own in summaries.items()
    }
    return {arm: rows for arm, rows in found.items() if rows}


def trends(results: Mapping[str, Any]) -> dict[str, Any]:
    """{"trend": ...} of every arm with a branch, against the nulls where there are any; {} where none has one."""
    ablation, equal_step = results.get("ablation", {}), results.get("equal_step", {})
    nulls = {
        arm: {name: by_arm[arm] for name, by_arm in results.get("nulls", {}).items() if arm in by_arm}
        for arm in results["depth"]
    }
    found = {
        arm: arm_trends(depth, ablation.get(arm), nulls[arm], equal_step.get(arm))
        for arm, depth in results["depth"].items()
    }
    return {"trend": found} if any(found.values()) else {}


def drop_documents(results: dict[str, Any]) -> None:
    """Take the sums per document, which the trends needed, out of the rows by layer; the cells keep them."""
    for part in set(BY_LAYER) & results.keys():
        results[part] = {
            arm: {
                seed: [{key: value for key, value in row.items() if key != "documents"} for row in rows]
                for seed, rows in seeds.items()
            }
            for arm, seeds in results[part].items()
        }
