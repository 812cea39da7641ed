"""Finding things in results.json: a comparison in the wanted direction, the sets of a domain, the power of a pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]
# Names of the sets that are scored by the paper's own protocol begin so.
PAPER = "paper:"
OPPOSITE = {"better": "worse", "worse": "better"}
# Two-sided 5 % and 80 % power: (1.960 + 0.842) / 1.960, from an interval's half width to a resolvable difference.
RESOLVABLE_HALF_WIDTHS = 1.43


def flipped(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The same comparison seen from the other arm: signs, limits, gains and the verdict turned round."""
    return {
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


def find(results: Results, arm: str, reference: str, set_name: str, metric: str) -> dict[str, Any] | None:
    """The comparison arm − reference on a set and metric, turned round where it is stored the other way; or None."""
    for entry in results["comparisons"]:
        if entry["set"] == set_name and entry["metric"] == metric:
            if (entry["arm"], entry["reference"]) == (arm, reference):
                return dict(entry)
            if (entry["arm"], entry["reference"]) == (reference, arm):
                return flipped(entry)
    return None


def primary(results: Results, set_name: str) -> str:
    """The metric that a set is judged by."""
    entry = results["sets"][set_name]
    return str(entry.get("primary") or ("bits_per_byte" if entry["kind"] == "document" else "acc"))


def sets_of(results: Results, *, domain: str | None = None, kind: str | None = None) -> list[str]:
    """Names of the sets of a domain ("in", "out") and kind ("document", "item"), in the order stored."""
    return [
        name
        for name, entry in results["sets"].items()
        if (domain is None or entry["domain"] == domain) and (kind is None or entry["kind"] == kind)
    ]


def trained_arms(results: Results) -> list[str]:
    """Names of the arms that train weights, in the order stored."""
    return [arm for arm, summary in results["arms"].items() if summary["trainable_parameters"]]


def is_pretraining(results: Results) -> bool:
    """Whether the arms were trained from scratch (`preskip pretrain`), not inserted into a frozen model."""
    return results.get("kind") == "pretrain"


def plain_arm(results: Results) -> str:
    """The arm without anything added: the untouched model, or the plain architecture trained from scratch."""
    return "base" if is_pretraining(results) else "none"


def is_declared(entry: Mapping[str, Any]) -> bool:
    """Whether a comparison belongs to the family declared before training."""
    return bool(entry.get("declared"))


def resolvable(results: Results, entry: Mapping[str, Any]) -> tuple[float, str]:
    """The smallest true difference that a comparison finds with 80 % power, and where that figure is from.

    Args:
        results: content of results.json.
        entry: a comparison.

    Returns:
        The difference in the metric's stored unit, and its basis: "measured" or "assumed" as stored in the run's
        power analysis, else "interval": 1.43 half widths of the comparison's own interval.
    """
    pair = {entry["arm"], entry["reference"]}
    for power in results.get("power") or ():
        same = power["set"] == entry["set"] and power["metric"] == entry["metric"]
        if same and {power["arm"], power["reference"]} == pair:
            return float(power["resolvable"]), str(power.get("basis") or "assumed")
    return RESOLVABLE_HALF_WIDTHS * (entry["high"] - entry["low"]) / 2, "interval"


def by_measure(comparisons: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, list[Mapping[str, Any]]]]:
    """(set, metric, comparisons) groups in the order in which they first appear."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for entry in comparisons:
        groups.setdefault((entry["set"], entry["metric"]), []).append(entry)
    for (set_name, metric), entries in groups.items():
        yield set_name, metric, entries


def ordered(entries: Sequence[Mapping[str, Any]], lower_is_better: bool) -> list[Mapping[str, Any]]:
    """Comparisons of one set and metric: against `none` first, then by reference, the best difference first."""
    references = list(dict.fromkeys(entry["reference"] for entry in entries))
    references.sort(key=lambda name: name != "none")
    sign = 1 if lower_is_better else -1
    return sorted(entries, key=lambda entry: (references.index(entry["reference"]), sign * entry["difference"]))
