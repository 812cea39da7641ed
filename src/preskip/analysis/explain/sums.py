"""What is kept of all tokens: sums per cluster of texts, per layer and per class, from which every interval is made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from preskip.analysis.explain.classes import CLASSES
from preskip.runs.explain_schema import ExplainedClass, LayerSizes
from preskip.runs.schema import Limits, MetricValue
from preskip.stats import CONFIDENCE, bootstrap_ratio

Array = NDArray[np.float64]
SIZES = {"skip_to_attention": ("skip", "attention"), "enrichment": ("change", "input")}


def interval(above: ArrayLike, below: ArrayLike, confidence: float = CONFIDENCE) -> Limits | None:
    """Σ above / Σ below with its interval over clusters: documents, or groups of them.

    Args:
        above: numerators, [clusters]; NaN where nothing was measured.
        below: denominators, [clusters]; a cluster with 0 is left out.
        confidence: level of the interval. Default 0.95.

    Returns:
        {"value", "low", "high"}, or None with fewer than 2 clusters, or so few that a limit is infinite.
    """
    tops, bottoms = np.asarray(above, np.float64), np.asarray(below, np.float64)
    usable = np.isfinite(tops) & np.isfinite(bottoms) & (bottoms > 0)
    if usable.sum() < 2:
        return None
    found = bootstrap_ratio(tops[usable], bottoms[usable], confidence=confidence)
    value, low, high = float(found.value), float(found.low), float(found.high)
    return {"value": value, "low": low, "high": high} if np.isfinite([value, low, high]).all() else None


def widened(above: ArrayLike, below: ArrayLike, count: int) -> MetricValue | None:
    """`interval` at the level 1 - 0.05 / count: `count` of them hold at once with 95 % (Bonferroni), so two that do not
    touch differ, however they were picked. The level is in "confidence".
    """
    confidence = 1 - (1 - CONFIDENCE) / count
    found = interval(above, below, confidence)
    return None if found is None else {**found, "confidence": confidence}


class Sums:
    """Sums over tokens, gathered chunk by chunk.

    Args:
        layers: number of layers with a branch.

    Sizes include a text's start token, as in `preskip.analysis.depth`; everything else is of text tokens alone.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._clusters: dict[str, dict[str, Array]] = {}
        self._classes: dict[tuple[str, str], dict[str, Array]] = defaultdict(dict)
        self._class_layers: dict[tuple[str, str], Array] = {}
        self._class_tokens: dict[tuple[str, str], int] = defaultdict(int)

    def add(
        self, cluster: str, values: Mapping[str, NDArray[np.float32]], labels: Mapping[str, list[str | None]]
    ) -> None:
        """Count some tokens of a cluster: values by name of `forward.MEASURES`, [layers, tokens], and labels.

        These are by dimension, a class per text token; the tokens before them are a start token's.
        """
        tokens = len(next(iter(labels.values())))
        row = self._clusters.setdefault(cluster, {name: np.zeros(self.layers) for name in (*values, "tokens")})
        exact = {name: value.astype(np.float64) for name, value in values.items()}
        text = {name: value[:, value.shape[1] - tokens :] for name, value in exact.items()}
        for name in values:
            row[name] += (text if name.endswith("cosine") else exact)[name].sum(1)
        row["tokens"] += tokens
        sizes = np.stack([text[name] for pair in SIZES.values() for name in pair])  # [4, layers, tokens]
        for dimension, own in labels.items():
            names = np.array([label or "" for label in own])
            for label in set(own) - {None}:
                key = (dimension, str(label))
                chosen = names == label
                summed = sizes[:, :, chosen].sum(2)  # [4, layers]
                kept = self._classes[key]
                kept[cluster] = kept.get(cluster, 0.0) + np.nansum(summed, 1)
                self._class_layers[key] = self._class_layers.get(key, 0.0) + summed
                self._class_tokens[key] += int(chosen.sum())

    def layer(self, index: int) -> LayerSizes:
        """Sizes and cosines of one layer with their intervals."""
        rows = self._clusters.values()

        def of(name: str) -> list[float]:
            return [row[name][index] for row in rows]

        def over(above: str, below: str) -> Limits | None:
            return interval(of(above), of(below))

        return {
            "skip_to_attention": over(*SIZES["skip_to_attention"]),
            "enrichment": over(*SIZES["enrichment"]),
            "skip_to_attention_wide": widened(of("skip"), of("attention"), self.layers),
            "alignment": {
                "attention": over("attention_cosine", "tokens"),
                "mlp": over("mlp_cosine", "tokens"),
            },
        }

    def classes(self) -> list[ExplainedClass]:
        """A row per class that occurs, in the order of `CLASSES`; ratios of sums over all layers together."""
        keys = [(dimension, name) for dimension, names in CLASSES.items() for name in names]
        keys = [key for key in keys if self._class_tokens[key]]
        rows: list[ExplainedClass] = []
        for key in keys:
            skip, attention, change, x = np.stack(list(self._classes[key].values())).T  # [clusters] each
            by_layer = self._class_layers[key]
            rows.append(
                {
                    "dimension": key[0],
                    "class": key[1],
                    "tokens": self._class_tokens[key],
                    "skip_to_attention": interval(skip, attention) if self._has(0) else None,
                    "skip_to_attention_wide": widened(skip, attention, len(keys)) if self._has(0) else None,
                    "enrichment": interval(change, x) if self._has(2) else None,
                    "by_layer": _ratios(by_layer[0], by_layer[1]) if self._has(0) else [],
                }
            )
        return rows

    def _has(self, place: int) -> bool:
        """Whether any layer has the part whose sums stand at `place`."""
        return any(np.isfinite(row[place]).any() for row in self._class_layers.values())


def _ratios(above: Array, below: Array) -> list[float | None]:
    return [float(a / b) if np.isfinite(a) and b > 0 else None for a, b in zip(above, below, strict=True)]
