"""What explain.json measures: names, where each stands in a layer, and values in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preskip.report.words.verdicts import decimals, limits_text, number
from preskip.runs.explain_schema import ExplainedLayer

Interval = Mapping[str, float]

SIZES = {
    "skip_to_attention": ("Round attention: the skip", "‖skip output‖ / ‖attention output‖"),
    "enrichment": ("Into attention: the enrichment", "‖x̃ − x̂‖ / ‖x̂‖"),
}
ABLATIONS = {"skip": "skip off", "enrichment": "enrichment off", "both": "both off"}
ALIGNMENTS = {"attention": "attention", "mlp": "MLP"}
DIMENSIONS = {
    "frequency": "Frequency",
    "position": "Place in the word",
    "repeat": "Seen before",
    "kind": "Kind",
    "case": "Case",
    "word": "Word",
}


def at(layer: ExplainedLayer, *path: str) -> Any:
    """A layer's measure, or None."""
    found: Any = layer
    for key in path:
        found = (found or {}).get(key)
    return found


def measured(layers: Sequence[ExplainedLayer], *path: str) -> list[tuple[int, Interval]]:
    """(layer, interval) of every layer that has the measure."""
    return [(layer["layer"], found) for layer in layers if (found := at(layer, *path)) is not None]


def value_text(found: Interval, *, sign: bool = False) -> str:
    """A value with its interval, such as "0.412 [0.380, 0.444]": two figures of the half width."""
    places = decimals(found["low"], found["high"], 2)
    return f"{number(found['value'], places, sign=sign)} {limits_text(found['low'], found['high'], places, sign=sign)}"
