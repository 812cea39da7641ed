"""Finding things in results.json: a comparison in the wanted direction, the sets of a domain, the power of a pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from preskip.metrics import Metric, metric_named
from preskip.runs.schema import ArmResults, Comparison, Declared, PowerEntry, Results, Search, Trial
from preskip.stats.verdicts import flipped

# Names of the sets that are scored by the paper's own protocol begin so.
PAPER = "paper:"
DOMAINS = {"in": "in-domain", "out": "out-of-domain"}
# Two-sided 5 % and 80 % power: (1.960 + 0.842) / 1.960, from an interval's half width to a resolvable difference.
RESOLVABLE_HALF_WIDTHS = 1.43


def find(results: Results, arm: str, reference: str, set_name: str) -> Comparison | None:
    """The comparison arm − reference on a set's primary metric, turned round where it is stored so; or None."""
    metric = primary(results, set_name)
    for entry in results["comparisons"]:
        if entry["set"] == set_name and entry["metric"] == metric:
            if (entry["arm"], entry["reference"]) == (arm, reference):
                return entry
            if (entry["arm"], entry["reference"]) == (reference, arm):
                return flipped(entry)
    return None


def primary(results: Results, set_name: str) -> str:
    """The metric that a set is judged by."""
    entry = results["sets"][set_name]
    return str(entry.get("primary") or ("bits_per_byte" if entry["kind"] == "document" else "acc"))


def metric_on(results: Results, set_name: str, metric: str = "") -> Metric:
    """How a metric (default: the primary one) is named and judged on a set."""
    found = results["sets"].get(set_name)
    return metric_named(metric or primary(results, set_name), cast(Mapping[str, Any] | None, found))


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


def reference_arm(results: Results) -> str:
    """The arm that the page is about: that of the first declared comparison, else `preskip`, else the first of those
    that train weights.
    """
    trained = trained_arms(results)
    first = [entry["arm"] for entry in _first_declared(results)[:1]]
    return next((arm for arm in (*first, "preskip", *trained) if arm in trained), "none")


def rivals(results: Results) -> list[str]:
    """What the page's first screen holds the reference arm against: the plain arm, the reference of the primary
    comparison, then LoRA or the plain controls.
    """
    others = ("base-wide", "base-deep", "base-flops") if is_pretraining(results) else ("lora", "lora-attention")
    arm = reference_arm(results)
    primary = (entry["reference"] for entry in _first_declared(results) if entry["arm"] == arm)
    found = dict.fromkeys((plain_arm(results), *primary, *others))
    return [other for other in found if other in results["arms"] and other != arm]


def _first_declared(results: Results) -> list[Declared]:
    """The comparisons declared before training up to the primary one, of a run before levels the first; [] where none
    was.
    """
    declared = (results.get("family") or {}).get("declared") or []
    return [entry for entry in declared if entry.get("level", 2) <= 1] or declared[:1]


def with_plain(entry: Comparison, plain: str) -> bool:
    """Whether a comparison is one with the arm `plain`, whichever of the two that is."""
    return plain in (entry["arm"], entry["reference"])


def is_declared(entry: Comparison) -> bool:
    """Whether a comparison belongs to the family declared before training."""
    return bool(entry.get("declared"))


def p_value(entry: Comparison) -> float | None:
    """The p that a comparison is judged by: corrected of a declared one, else as it is."""
    return entry.get("p_holm") if is_declared(entry) else entry.get("p_value")


def p_equivalence(entry: Comparison) -> float | None:
    """The p that its equivalence is judged by; runs before gatekeeping did not correct those of declared ones."""
    return entry.get("p_equivalence_holm", entry.get("p_equivalence"))


def resolvable(results: Results, entry: Comparison) -> tuple[float, str]:
    """The smallest true difference that a comparison finds with 80 % power, in the metric's stored unit, and its basis:
    "measured" or "assumed" as in the run's power analysis, else "interval": 1.43 half widths of the comparison's own.
    """
    if power := _power(results, entry):
        return float(power["resolvable"]), str(power.get("basis") or "assumed")
    return RESOLVABLE_HALF_WIDTHS * (entry["high"] - entry["low"]) / 2, "interval"


def doubled(results: Results, entry: Comparison) -> float | None:
    """The same if the training seeds vary twice as much; None where the run's power analysis does not say."""
    power = _power(results, entry)
    return power.get("doubled") if power and power["seeds"] > 1 else None


def _power(results: Results, entry: Comparison) -> PowerEntry | None:
    """What the run's power analysis says of a comparison, in either direction."""
    pair = {entry["arm"], entry["reference"]}
    for power in results.get("power") or ():
        same = power["set"] == entry["set"] and power["metric"] == entry["metric"]
        if same and {power["arm"], power["reference"]} == pair:
            return power
    return None


def by_measure(comparisons: Sequence[Comparison]) -> Iterator[tuple[str, str, list[Comparison]]]:
    """(set, metric, comparisons) groups in the order in which they first appear."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for entry in comparisons:
        groups.setdefault((entry["set"], entry["metric"]), []).append(entry)
    for (set_name, metric), entries in groups.items():
        yield set_name, metric, entries


def ordered(entries: Sequence[Comparison], lower_is_better: bool, plain: str) -> list[Comparison]:
    """Comparisons of one set and metric: against `plain` first, then by reference, the best difference first."""
    references = list(dict.fromkeys(entry["reference"] for entry in entries))
    references.sort(key=lambda name: name != plain)
    sign = 1 if lower_is_better else -1
    return sorted(entries, key=lambda entry: (references.index(entry["reference"]), sign * entry["difference"]))


def development(point: Trial, domain: str) -> Any:
    """What a point of a search reached on development documents of the corpus ("in": an interval) or elsewhere ("out":
    one per set); None where it diverged.
    """
    return None if point.get("diverged") else cast(dict[str, Any], point.get("dev") or {}).get(domain)


def chosen_rate(search: Search, point: Trial) -> float:
    """The rate that a search chose, of the training seed that a point was trained for."""
    return search.get("by_seed", {}).get(str(point.get("for_seed")), search["chosen"])


def is_chosen(search: Search, point: Trial) -> bool:
    """Whether a point of a search is the chosen learning rate at the last rung."""
    last = max(other["rung"] for other in search["trace"])
    return point["rung"] == last and point["learning_rate"] == chosen_rate(search, point)


def rate_text(summary: ArmResults) -> str:
    """An arm's learning rate, or the range of those of its seeds; "–" where nothing is trained."""
    stated: list[float | None] = [*(summary.get("learning_rates") or {}).values()] or [summary["learning_rate"]]
    rates = [rate for rate in stated if rate]
    if not rates:
        return "–"
    low, high = min(rates), max(rates)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
