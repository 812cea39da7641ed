"""What a comparison says in one word: better, worse, equivalent or undecided; and how each metric is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

Verdict = Literal["better", "worse", "equivalent", "undecided"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

ALPHA = 0.05
# The largest difference that counts as none: half a per cent of a typical loss, one point of accuracy.
DEFAULT_MARGINS = {"bits_per_byte": 0.005, "nll": 0.02, "acc": 0.01, "acc_norm": 0.01, "exact_match": 0.01}
_LOWER_IS_BETTER = {"bits_per_byte", "word_perplexity", "byte_perplexity", "perplexity", "nll", "loss"}
_ACCURACIES = {"acc", "acc_norm", "exact_match"}


def base_metric(metric: str) -> str:
    """The metric without the filter of lm-eval through which it was taken: exact_match of exact_match,strict-match."""
    return metric.split(",")[0]


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of this metric is the better one; a metric not known is read as "higher is better"."""
    return base_metric(metric) in _LOWER_IS_BETTER


def is_accuracy(metric: str) -> bool:
    """Whether the metric is a share of right answers by its name, whatever its values."""
    return base_metric(metric) in _ACCURACIES


def margin_of(margins: Mapping[str, float], set_name: str, metric: str) -> float | None:
    """The equivalence margin of a metric on a set: under "set.metric", else under "metric", else None."""
    return margins.get(f"{set_name}.{metric}", margins.get(metric, margins.get(base_metric(metric))))


def verdict_of(comparison: Mapping[str, Any], alpha: float = ALPHA) -> Verdict:
    """Better or worse when the interval excludes 0 and p ≤ alpha; else equivalent when the equivalence p ≤ alpha; else
    undecided.

    Args:
        comparison: an entry of results.json's `comparisons`; p is `p_holm` where the comparison was declared before
            training, `p_value` otherwise.
        alpha: level of both tests. Default 0.05.
    """
    low, high = comparison["low"], comparison["high"]
    p_value = comparison.get("p_holm") if comparison.get("declared") else None
    if p_value is None:
        p_value = comparison["p_value"]
    if not low <= 0 <= high and p_value <= alpha:
        return "better" if (high < 0) == lower_is_better(comparison["metric"]) else "worse"
    p_equivalence = comparison.get("p_equivalence")
    if p_equivalence is not None and p_equivalence <= alpha:
        return "equivalent"
    return "undecided"
