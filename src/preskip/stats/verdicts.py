"""What a comparison says in one word: better, worse, equivalent or undecided."""

from __future__ import annotations

from collections.abc import Mapping

from preskip.metrics import metric_named
from preskip.runs.schema import Comparison, SetFacts, Verdict

ALPHA = 0.05


def margin_of(margins: Mapping[str, float], set_name: str, metric: str) -> float | None:
    """The equivalence margin of a metric on a set: under "set.metric", else under "metric", else None."""
    return margins.get(f"{set_name}.{metric}", margins.get(metric, margins.get(metric_named(metric).key)))


def verdict_of(comparison: Comparison, alpha: float = ALPHA, described: SetFacts | None = None) -> Verdict:
    """Better or worse when the interval excludes 0 and p ≤ alpha; else equivalent when the equivalence p ≤ alpha; else
    undecided.

    Args:
        comparison: an entry of results.json's `comparisons`; p is `p_holm` where the comparison was declared before
            training, `p_value` otherwise.
        alpha: level of both tests. Default 0.05.
        described: its evaluation set as in run.json, for the metric's direction; see `metric_named`.
    """
    low, high = comparison["low"], comparison["high"]
    p_value = comparison.get("p_holm") if comparison.get("declared") else None
    if p_value is None:
        p_value = comparison["p_value"]
    if not low <= 0 <= high and p_value <= alpha:
        return "better" if (high < 0) == metric_named(comparison["metric"], described).lower_is_better else "worse"
    p_equivalence = comparison.get("p_equivalence")
    if p_equivalence is not None and p_equivalence <= alpha:
        return "equivalent"
    return "undecided"
