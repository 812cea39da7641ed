"""What a paired comparison says, in words, always with its interval.

The verdict itself is read from the results, never computed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from preskip.metrics import metric_named
from preskip.runs.schema import Comparison, SetFacts, Trend
from preskip.runs.stored import UNTRAINED
from preskip.stats.equal_harm import MeanDifference
from preskip.stats.verdicts import FEWEST_UNITS, independent_units

MINUS = "−"
# From here on a figure's decimals say nothing.
BEYOND = 1e5


def set_title(sets: Mapping[str, SetFacts], key: str) -> str:
    """The title of an evaluation set, or its key if it has none."""
    return (key in sets and sets[key].get("title")) or key


def set_label(sets: Mapping[str, SetFacts], key: str) -> str:
    """What a set is called in sentences and figures: a task of lm-eval by its name, a corpus without what part it is.

    The set's full title stands where the sets are listed.
    """
    if key in sets and sets[key].get("lm_eval"):
        return key
    return set_title(sets, key).removesuffix(", held-out documents")


def decimals(low: float, high: float, minimum: int, borders: Sequence[float] = (0.0,)) -> int:
    """Decimals that leave two figures of the interval's half width, between `minimum` and 6.

    Args:
        low: the lower limit.
        high: the upper limit.
        minimum: the fewest decimals.
        borders: what a verdict rests on: a limit beside one of them is not rounded onto it.
    """
    half = abs(high - low) / 2
    if half <= 0 or not math.isfinite(half):
        return minimum
    places = min(6, max(minimum, 1 - math.floor(math.log10(half))))

    def hides() -> bool:
        pairs = ((limit, border) for limit in (low, high) for border in borders)
        return any(limit != border and round(limit, places) == round(border, places) for limit, border in pairs)

    while places < 6 and hides():
        places += 1
    return places


def comparison_decimals(comparison: Mapping[str, Any]) -> int:
    """Decimals of a comparison's difference and limits in the unit that is shown: 0 and the margin stay apart."""
    metric = metric_named(comparison["metric"])
    margin = metric.factor * (comparison.get("margin") or 0.0)
    low, high = (metric.factor * comparison[key] for key in ("low", "high"))
    return decimals(low, high, metric.minimum_decimals, (0.0, margin, -margin))


def number(value: float, places: int, *, sign: bool = False) -> str:
    """A number with a true minus sign, thousands separated; never "−0.0". What has decimals and is beyond all measure,
    as the perplexity of a random model, keeps three figures: "4.52e11".
    """
    rounded = round(value, places) + 0.0
    text = f"{abs(rounded):,.{places}f}"
    if places and abs(rounded) >= BEYOND:
        text = f"{abs(value):.2e}".replace("e+0", "e").replace("e+", "e")
    if rounded < 0:
        return MINUS + text
    return "+" + text if sign and rounded > 0 else text


def p_text(p: float | None) -> str:
    """A p-value with two figures, "< 0.0001" below that, "–" for none."""
    if p is None:
        return "–"
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def nulls_text(trend: Trend) -> str:
    """The ρ of each of a norm's nulls, such as "noise +0.21, −0.16; shuffled +0.87"; "" where it has none."""
    return "; ".join(
        f"{name} {', '.join(number(rho, 2, sign=True) for rho in rhos)}"
        for name, rhos in (trend.get("nulls") or {}).items()
    )


def limits_text(low: float | None, high: float | None, places: int, *, sign: bool = True) -> str:
    """An interval, such as "[−0.057, +0.047]"; "–" for none."""
    if low is None or high is None:
        return "–"
    return f"[{number(low, places, sign=sign)}, {number(high, places, sign=sign)}]"


def mean_difference_texts(found: MeanDifference | None) -> tuple[str, str, str]:
    """A mean difference over seeds in bits per byte, its interval and p; dashes for none."""
    if found is None:
        return "–", "–", "–"
    places = decimals(found["low"], found["high"], 3)
    limits = limits_text(found["low"], found["high"], places)
    return number(found["value"], places, sign=True), limits, p_text(found["p_value"])


def difference_text(comparison: Mapping[str, Any]) -> dict[str, str]:
    """Signed difference and limits as shown in the tables: keys value, interval, unit."""
    metric = metric_named(comparison["metric"])
    value, low, high = (metric.factor * comparison[key] for key in ("difference", "low", "high"))
    places = comparison_decimals(comparison)
    return {
        "value": number(value, places, sign=True),
        "interval": limits_text(low, high, places),
        "unit": metric.difference_unit,
    }


def looks_text(comparison: Mapping[str, Any]) -> str:
    """The limits of a comparison that are adjusted for looking while seeds were added; empty without looks."""
    looked = comparison.get("looked")
    return difference_text({**comparison, **looked})["interval"] + " for looks" if looked else ""


def interval_text(key: str, metric_value: Mapping[str, Any] | None) -> dict[str, str] | None:
    """A metric's value and interval as shown in the arms table, or None when it was not measured."""
    if not metric_value or metric_value.get("value") is None:
        return None
    metric = metric_named(key)
    value, low, high = metric.factor * metric_value["value"], metric_value.get("low"), metric_value.get("high")
    if low is None or high is None:
        return {"value": number(value, metric.minimum_decimals) + metric.unit, "interval": ""}
    low, high = metric.factor * low, metric.factor * high
    places = decimals(low, high, metric.minimum_decimals)
    return {"value": number(value, places) + metric.unit, "interval": limits_text(low, high, places, sign=False)}


def amount(metric_key: str, size: float) -> str:
    """An unsigned size on a metric's difference scale, such as "0.0050" or "1.2 points": two figures."""
    metric = metric_named(metric_key)
    shown = abs(metric.factor * size)
    return number(shown, _two_figures(shown)) + metric.difference_unit


def margin_text(metric_key: str, margin: float) -> str:
    """A stated margin with all its figures, two at least, such as "±0.0050" or "±1.25 points"."""
    metric = metric_named(metric_key)
    shown = metric.factor * margin
    places = _two_figures(shown)
    while places < 6 and round(shown, places) != round(shown, 6):
        places += 1
    return f"±{number(shown, places)}{metric.difference_unit}"


def _two_figures(size: float) -> int:
    return min(6, max(0, 1 - math.floor(math.log10(size)))) if size > 0 else 0


def sentence(comparison: Comparison, sets: Mapping[str, SetFacts]) -> str:
    """One comparison in plain words, such as "preskip lowers bits per byte on WikiText-2 by 0.052 [0.047, 0.058]
    against none". Of one seed it is about this training, not about the method, and says so.
    """
    metric = metric_named(comparison["metric"])
    arm, reference, verdict = comparison["arm"], comparison["reference"], comparison["verdict"]
    where = f"{metric.phrase} on {set_label(sets, comparison['set'])}"
    shown = difference_text(comparison)
    signed = f"the difference is {shown['value']} {shown['interval']}{shown['unit']}"
    if comparison["seeds"] == 1:
        arm, reference = (name if name == UNTRAINED else f"this training of {name}" for name in (arm, reference))
    if verdict == "too few units":
        return (
            f"{arm} and {reference} are not judged in {where}: {signed}, but from {_independent(comparison)}, fewer "
            f"than {FEWEST_UNITS}"
        )
    if verdict == "equivalent":
        return f"{arm} and {reference} are equivalent in {where}: {signed}, within {_margin(comparison)}"
    if verdict == "undecided":
        return f"{arm} and {reference} cannot be told apart in {where}: {signed}, {_why_undecided(comparison)}"
    value, low, high = (metric.factor * comparison[key] for key in ("difference", "low", "high"))
    places = comparison_decimals(comparison)
    near, far = (low, high) if value > 0 else (-high, -low)
    # What a look has decided stays so, though all seeds together may leave it open.
    past = ", decided at an earlier look" if near < 0 and "looked" in comparison else ""
    return (
        f"{arm} {'raises' if value > 0 else 'lowers'} {where} by {number(abs(value), places)} "
        f"{limits_text(near, far, places, sign=False)}{metric.difference_unit} against {reference}{past}"
    )


def _independent(comparison: Comparison) -> str:
    """The number of independent units in words."""
    count = independent_units(comparison)
    noun = comparison["unit"] if comparison["clusters"] is None else "cluster"
    return f"{count} independent {noun}{'s' if count != 1 else ''}"


def _margin(comparison: Comparison) -> str:
    margin = comparison.get("margin")
    return "the margin" if margin is None else margin_text(comparison["metric"], margin)


def _why_undecided(comparison: Comparison) -> str:
    low, high, margin = comparison["low"], comparison["high"], comparison.get("margin")
    if low <= 0 <= high:
        if margin is None:
            return "an interval that includes 0"
        if max(-low, high) > margin:
            return f"an interval that includes 0 and reaches beyond {_margin(comparison)}"
        p = p_text(comparison.get("p_equivalence_holm", comparison.get("p_equivalence")))
        corrected = " corrected for the family" if "p_equivalence_holm" in comparison else ""
        return f"an interval that includes 0, within {_margin(comparison)}, but p of equivalence{corrected} is {p}"
    if comparison.get("p_holm") is not None:
        return f"but p corrected for the family is {p_text(comparison['p_holm'])}"
    return f"but p is {p_text(comparison.get('p_value'))}"


def scope(comparisons: Sequence[Comparison], seeds: int) -> str:
    """What the intervals cover with so many seeds at most: items and documents alone, or training randomness too."""
    if seeds <= 1:
        return (
            "One seed: the intervals cover items only, not training randomness. "
            "Another seed could move every trained arm by more than they show."
        )
    if any(entry.get("seeds", 1) < seeds for entry in comparisons):
        return (
            f"Up to {seeds} seeds: only comparisons with several seeds cover training randomness; the tables say which."
        )
    few = " With so few seeds the training part is itself known only roughly." if seeds < 5 else ""
    return f"{seeds} seeds: the intervals cover both items and training randomness.{few}"
