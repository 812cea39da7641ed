"""The branch by layer in results.json, from the stored cells: profiles, nulls, and trends over depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from preskip.runs.schema import CellSummary, DepthRow, NormRow, Results
from preskip.stats.trends import arm_trends

NORMS = ("up_norm", "down_norm", "skip_norm")


def by_seed(
    summaries: Mapping[str, Sequence[CellSummary]], part: Literal["depth", "ablation"]
) -> dict[str, dict[str, Any]]:
    """The rows of one part of cell.json by arm and seed, of the arms that have any.

    Args:
        summaries: content of cell.json of each seed, by arm.
        part: its key, e.g. "depth".
    """
    found = {
        arm: {str(summary["seed"]): rows for summary in own if (rows := summary.get(part))}
        for arm, own in summaries.items()
    }
    return {arm: rows for arm, rows in found.items() if rows}


def norms(rows: Sequence[DepthRow]) -> list[NormRow]:
    """What results.json holds of a null's depth rows: the layer and its norms."""
    return [{name: row[name] for name in ("layer", *NORMS)} for row in rows]  # type: ignore[literal-required, misc]


def add_trends(results: Results) -> None:
    """Add "trend" to results.json, of every arm with a branch, against the nulls where there are any.

    The sums per document, which the trends need, are taken out of the rows by layer; the cells keep them.
    """
    ablation, equal_step, nulls = results.get("ablation", {}), results.get("equal_step", {}), results.get("nulls", {})
    found: Any = {
        arm: arm_trends(
            depth,
            ablation.get(arm),
            {name: by_arm[arm] for name, by_arm in nulls.items() if arm in by_arm},
            equal_step.get(arm),
        )
        for arm, depth in results["depth"].items()
    }
    if any(found.values()):
        results["trend"] = found
    by_layer: list[Any] = [results["depth"], equal_step, ablation]
    for part in by_layer:
        for seeds in part.values():
            for seed, rows in seeds.items():
                seeds[seed] = [{key: value for key, value in row.items() if key != "documents"} for row in rows]
