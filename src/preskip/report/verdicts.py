"""What a paired comparison says, in words: better, worse or undecided, always with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["better", "worse", "undecided"]

MINUS = "−"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How one metric is named and read. `factor` turns stored values into shown ones (accuracy into per cent)."""

    name: str
    phrase: str
    unit: str = ""
    difference_unit: str = ""
    factor: float = 1.0
    lower_is_better: bool = True
    minimum_decimals: int = 3


METRICS = {
    "bits_per_byte": Metric(name="Bits per byte", phrase="held-out bits per byte"),
    "word_perplexity": Metric(name="Word perplexity", phrase="held-out word perplexity", minimum_decimals=1),
    "last_word_accuracy": Metric(
        name="Last-word accuracy",
        phrase="last-word accuracy",
        unit=" %",
        difference_unit=" points",
        factor=100.0,
        lower_is_better=False,
        minimum_decimals=1,
    ),
}


def metric_named(key: str) -> Metric:
    """The metric of that key; an unknown one is shown under its own name and read as "higher is better"."""
    words = key.replace("_", " ")
    return METRICS.get(key) or Metric(name=words.capitalize(), phrase=words, lower_is_better=False)


def outcome(comparison: Mapping[str, Any]) -> Outcome:
    """Better or worse when the interval excludes 0 and, for accuracies, the exact McNemar test agrees; else undecided.

    With few discordant items the bootstrap interval and the exact test can disagree; then nothing is claimed.
    """
    low, high, p_value = comparison["low"], comparison["high"], comparison.get("p_value")
    if low <= 0 <= high or (p_value is not None and p_value > 1 - comparison.get("confidence", 0.95)):
        return "undecided"
    improved = (high < 0) == metric_named(comparison["metric"]).lower_is_better
    return "better" if improved else "worse"


def decimals(low: float, high: float, minimum: int) -> int:
    """Decimals that leave two figures of the interval's half width, between `minimum` and 6."""
    half = abs(high - low) / 2
    if half <= 0 or not math.isfinite(half):
        return minimum
    return min(6, max(minimum, 1 - math.floor(math.log10(half))))


def number(value: float, places: int, *, sign: bool = False) -> str:
    """A number with a true minus sign, thousands separated; never "−0.0"."""
    rounded = round(value, places) + 0.0
    text = f"{abs(rounded):,.{places}f}"
    if rounded < 0:
        return MINUS + text
    return "+" + text if sign and rounded > 0 else text


def difference_text(comparison: Mapping[str, Any]) -> dict[str, str]:
    """Signed difference and limits as shown in the table: keys value, interval, unit."""
    metric = metric_named(comparison["metric"])
    value, low, high = (metric.factor * comparison[key] for key in ("difference", "low", "high"))
    places = decimals(low, high, metric.minimum_decimals)
    return {
        "value": number(value, places, sign=True),
        "interval": f"[{number(low, places, sign=True)}, {number(high, places, sign=True)}]",
        "unit": metric.difference_unit,
    }


def interval_text(key: str, metric_value: Mapping[str, Any] | None) -> dict[str, str] | None:
    """A metric's value and interval as shown in the arms table, or None when it was not measured."""
    if not metric_value or metric_value.get("value") is None:
        return None
    metric = metric_named(key)
    value = metric.factor * metric_value["value"]
    low, high = metric_value.get("low"), metric_value.get("high")
    if low is None or high is None:
        return {"value": number(value, metric.minimum_decimals) + metric.unit, "interval": ""}
    low, high = metric.factor * low, metric.factor * high
    places = decimals(low, high, metric.minimum_decimals)
    return {
        "value": number(value, places) + metric.unit,
        "interval": f"[{number(low, places)}, {number(high, places)}]",
    }


def sentence(comparison: Mapping[str, Any]) -> str:
    """One comparison in plain words, such as "preskip lowers held-out bits per byte by 0.052 [0.047, 0.058] against
    none".
    """
    metric = metric_named(comparison["metric"])
    arm, reference = comparison["arm"], comparison["reference"]
    if outcome(comparison) == "undecided":
        shown = difference_text(comparison)
        reason = "and that interval includes 0"
        if not comparison["low"] <= 0 <= comparison["high"]:
            reason = f"but the exact McNemar p is {comparison['p_value']:.2g}"
        return (
            f"{arm} and {reference} cannot be told apart on {metric.phrase}: the difference is {shown['value']} "
            f"{shown['interval']}{shown['unit']}, {reason}"
        )
    value, low, high = (metric.factor * comparison[key] for key in ("difference", "low", "high"))
    places = decimals(low, high, metric.minimum_decimals)
    near, far = sorted((abs(low), abs(high)))
    verb = "lowers" if high < 0 else "raises"
    return (
        f"{arm} {verb} {metric.phrase} by {number(abs(value), places)} "
        f"[{number(near, places)}, {number(far, places)}]{metric.difference_unit} against {reference}"
    )


def verdicts(comparisons: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """All comparisons as {"outcome", "text"}; those against the untrained model first, otherwise in the order given."""
    ordered = sorted(comparisons, key=lambda entry: entry["reference"] != "none")
    return [{"outcome": outcome(entry), "text": sentence(entry)} for entry in ordered]


def scope(comparisons: Sequence[Mapping[str, Any]], seeds: int) -> str:
    """What the intervals cover: documents alone, or training randomness too."""
    if seeds <= 1:
        return (
            "One seed: the intervals cover documents only, not training randomness. "
            "Another seed could move every trained arm by more than they show."
        )
    if any(entry.get("seeds", 1) < seeds for entry in comparisons):
        return (
            f"Up to {seeds} seeds: only comparisons with several seeds cover training randomness; the table says which."
        )
    few = " With so few seeds the training part is itself known only roughly." if seeds < 5 else ""
    return f"{seeds} seeds: the intervals cover both documents and training randomness.{few}"
