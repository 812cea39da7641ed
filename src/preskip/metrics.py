"""The metrics, one entry each: everything that names, judges, plans for or draws a metric reads it here.

A new metric is an entry of `_ENTRIES`, and the code that computes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

# Share of items on which two arms are assumed to differ before anything is measured.
DISCORDANT = 0.10


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric. Sizes are in the stored unit; deviations are assumed when a run is planned (docs/statistics.md).

    Args:
        key: its name in items.jsonl and results.json.
        name: as a heading.
        phrase: in a sentence.
        column: above a narrow column. Default: `name` in lower case.
        unit: written behind a value.
        difference_unit: written behind a difference.
        factor: turns stored values into shown ones. Default 1.
        lower_is_better: direction, unless lm-eval states another for the set. Default True.
        margin: the largest difference that counts as none. None: equivalence is not tested.
        unit_deviation: standard deviation over units of one seed's paired difference. None: no power is planned.
        seed_deviation: standard deviation over seeds of the whole difference.
        minimum_decimals: fewest decimals beside an interval. Default 3.
        is_accuracy: a share of right answers. A task is judged by its first one in the order of `METRICS`.
    """

    key: str
    name: str
    phrase: str
    column: str = ""
    unit: str = ""
    difference_unit: str = ""
    factor: float = 1.0
    lower_is_better: bool = True
    margin: float | None = None
    unit_deviation: float | None = None
    seed_deviation: float = 0.0
    minimum_decimals: int = 3
    is_accuracy: bool = False

    @property
    def decimals(self) -> int:
        """Decimals of a number that stands without its interval."""
        return 4 if self.minimum_decimals == 3 else self.minimum_decimals

    @property
    def direction(self) -> str:
        """In words: lower is better, or higher is better."""
        return f"{'lower' if self.lower_is_better else 'higher'} is better"


def _accuracy(key: str, name: str, column: str = "") -> Metric:
    return Metric(
        key=key,
        name=name,
        phrase=name[0].lower() + name[1:],
        column=column,
        unit=" %",
        difference_unit=" points",
        factor=100.0,
        lower_is_better=False,
        margin=0.01,
        unit_deviation=math.sqrt(DISCORDANT),
        seed_deviation=0.005,
        minimum_decimals=1,
        is_accuracy=True,
    )


_ENTRIES = (
    Metric(
        key="bits_per_byte",
        name="Bits per byte",
        phrase="bits per byte",
        column="bits/byte",
        margin=0.005,  # half a per cent of a typical loss
        unit_deviation=0.025,
        seed_deviation=0.002,
    ),
    Metric(key="word_perplexity", name="Word perplexity", phrase="word perplexity", minimum_decimals=1),
    Metric(key="byte_perplexity", name="Byte perplexity", phrase="byte perplexity"),
    Metric(key="perplexity", name="Perplexity", phrase="perplexity", minimum_decimals=1),
    Metric(
        key="nll",
        name="Target loss",
        phrase="target loss",
        difference_unit=" nats",
        margin=0.02,
        unit_deviation=1.0,
        seed_deviation=0.02,
    ),
    Metric(key="loss", name="Loss", phrase="loss", difference_unit=" nats"),
    _accuracy("acc", "Accuracy", "accuracy, %"),
    _accuracy("acc_norm", "Length-normalised accuracy"),
    _accuracy("exact_match", "Exact match"),
)
METRICS = {metric.key: metric for metric in _ENTRIES}
DEFAULT_MARGINS = {key: metric.margin for key, metric in METRICS.items() if metric.margin is not None}


def metric_named(key: str, described: Mapping[str, Any] | None = None) -> Metric:
    """The metric of a key of results.json, also with a filter of lm-eval, such as "exact_match,strict-match".

    A metric without an entry is named by its key, and higher is better.

    Args:
        key: the metric's key.
        described: its evaluation set as in run.json. What lm-eval states there, in "higher_is_better", overrides the
            entry's direction.
    """
    base, _, filter_name = key.partition(",")
    words = base.replace("_", " ")
    metric = METRICS.get(base) or Metric(key=base, name=words.capitalize(), phrase=words, lower_is_better=False)
    higher = ((described or {}).get("higher_is_better") or {}).get(base)
    if higher is not None:
        metric = replace(metric, lower_is_better=not higher)
    if filter_name:
        name, phrase = f"{metric.name} ({filter_name})", f"{metric.phrase} ({filter_name})"
        metric = replace(metric, name=name, phrase=phrase, column="")
    return metric
