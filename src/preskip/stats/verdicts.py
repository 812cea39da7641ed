"""What a comparison says in one word: better, worse, equivalent, undecided, or too few units to judge by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from preskip.metrics import metric_named
from preskip.runs.schema import Comparison, PairedDifference, SetFacts, Verdict

ALPHA = 0.05
# Of fewer independent units no sign or randomisation test can reach 5 %: 2 / 2^5 is 0.0625.
FEWEST_UNITS = 6
OPPOSITE: Mapping[Verdict, Verdict] = {"better": "worse", "worse": "better"}


def margin_of(margins: Mapping[str, float], set_name: str, metric: str) -> float | None:
    """The equivalence margin of a metric on a set: under "set.metric", else under "metric", else None."""
    return margins.get(f"{set_name}.{metric}", margins.get(metric, margins.get(metric_named(metric).key)))


def independent_units(comparison: PairedDifference) -> int:
    """Clusters, or where there are none documents or items."""
    clusters = comparison["clusters"]
    return comparison["units"] if clusters is None else clusters


def units_of_variance(comparison: PairedDifference) -> int:
    """What the variance components are over: independent units, but the items themselves where one cluster has all."""
    return comparison["units"] if comparison["clusters"] == 1 else independent_units(comparison)


def verdict_of(comparison: Comparison, alpha: float = ALPHA, described: SetFacts | None = None) -> Verdict:
    """Too few units where fewer than 6 are independent; else better or worse, by the difference's sign, when p ≤ alpha;
    else equivalent when the equivalence p ≤ alpha; else undecided.

    The interval may be shown at another level than 1 - alpha, so p alone judges. Of means both say the same; of
    accuracies with one seed p is McNemar's exact one, and limits may touch 0 where it is below alpha.

    Args:
        comparison: an entry of results.json's `comparisons`; p is `p_holm` where the comparison was declared before
            training, `p_value` otherwise.
        alpha: level of both tests. Default 0.05.
        described: its evaluation set as in run.json, for the metric's direction; see `metric_named`.
    """
    if independent_units(comparison) < FEWEST_UNITS:
        return "too few units"
    p_value = comparison.get("p_holm") if comparison.get("declared") else None
    if p_value is None:
        p_value = comparison["p_value"]
    if p_value <= alpha:
        is_less = comparison["difference"] < 0
        return "better" if is_less == metric_named(comparison["metric"], described).lower_is_better else "worse"
    p_equivalence = comparison.get("p_equivalence_holm", comparison.get("p_equivalence"))
    if p_equivalence is not None and p_equivalence <= alpha:
        return "equivalent"
    return "undecided"


def flipped(entry: Comparison) -> Comparison:
    """The same comparison seen from the other arm: signs, limits, gains and the verdict turned round."""
    detail = entry.get("detail")
    turned = {
        **entry,
        "arm": entry["reference"],
        "reference": entry["arm"],
        "difference": -entry["difference"],
        "low": -entry["high"],
        "high": -entry["low"],
        "gained": entry.get("lost"),
        "lost": entry.get("gained"),
        "verdict": OPPOSITE.get(entry["verdict"], entry["verdict"]),
    }
    if detail is not None:
        predicted = detail["new_seed"]
        turned["detail"] = {
            **detail,
            "by_seed": [-value for value in detail["by_seed"]],
            "new_seed": None if predicted is None else [-predicted[1], -predicted[0]],
            "probability_higher": 1 - detail["probability_higher"],
        }
    if (looked := entry.get("looked")) is not None:
        turned["looked"] = {**looked, "low": -looked["high"], "high": -looked["low"]}
    return cast(Comparison, turned)
