"""Paired differences from plain tables of numbers, and the exact test on items that differ."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats

from preskip.errors import PreskipError
from preskip.stats.bootstrap import RESAMPLES, bootstrap_ratio
from preskip.stats.discordant import distribution_of
from preskip.stats.inputs import Array, Labels, paired
from preskip.stats.intervals import CONFIDENCE, Distribution, Interval


@dataclass(frozen=True, kw_only=True)
class AccuracyDifference:
    """Accuracy of a minus accuracy of b on shared items.

    `gained` and `lost` count the items on which a is right more often than b over the seeds, or less often; each item
    counts once, so `p_value` (exact, two-sided) is McNemar's with one seed and the sign test over items with several.
    It takes items as independent and says nothing about training randomness; the distribution is the one that knows
    clusters and seeds.
    """

    distribution: Distribution
    gained: int
    lost: int

    @property
    def p_value(self) -> float:
        """Exact two-sided p of the discordant items."""
        return mcnemar(self.gained, self.lost)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar p of `gained` against `lost` discordant items; 1.0 when there is none.

    Raises:
        PreskipError: a count is negative.
    """
    if gained < 0 or lost < 0:
        raise PreskipError(f"discordant counts {gained} and {lost} must not be negative")
    if gained + lost == 0:
        return 1.0
    return float(scipy_stats.binomtest(gained, gained + lost, 0.5).pvalue)


def paired_ratio_difference(
    nll_a: ArrayLike,
    nll_b: ArrayLike,
    bytes: ArrayLike,
    *,
    scale: float = 1 / math.log(2),
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Difference of two arms' ratios (a - b) on the same documents, by default in bits per byte.

    Both arms are scored on the same bytes, so the difference is itself a ratio of sums, Σ(nll_a - nll_b) / (ln 2 · Σ
    bytes), and what makes a document hard for both cancels.

    Args:
        nll_a: nats per document, [documents] or [seeds, documents]; row s is paired with row s of `nll_b`.
        nll_b: the same for the reference. One row serves all seeds of the other arm (an untrained reference has no
            seeds).
        bytes: bytes per document, [documents].
        scale: factor on the ratio, default 1 / ln 2 (nats to bits).
        confidence: level, default 0.95.
        resamples: bootstrap replicates, default 9,999.
        seed: of the bootstrap, default 0.
    """
    a, b = paired(nll_a, nll_b, "nll_a", "nll_b")
    return bootstrap_ratio(a - b, bytes, scale=scale, confidence=confidence, resamples=resamples, seed=seed)


def paired_accuracy_difference(
    correct_a: ArrayLike,
    correct_b: ArrayLike,
    clusters: Labels | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> AccuracyDifference:
    """Difference of two accuracies (a - b) on the same items; where few differ, see `preskip.stats.discordant`.

    Args:
        correct_a: 0/1 or booleans, [items] or [seeds, items].
        correct_b: the same for the reference; one row serves all seeds of the other arm.
        clusters: as of `RatioDistribution`.
        resamples: bootstrap replicates, default 9,999.
        seed: of the bootstrap, default 0.

    Raises:
        PreskipError: a value other than 0 and 1, other items, or as `RatioDistribution`.
    """
    a, b = paired(correct_a, correct_b, "correct_a", "correct_b")
    for name, array in (("correct_a", a), ("correct_b", b)):
        if not np.isin(array, (0.0, 1.0)).all():
            raise PreskipError(f"{name} holds values other than 0 and 1: give one right/wrong value per item")
    difference = a - b
    distribution = distribution_of(difference, clusters, resamples=resamples, seed=seed)
    gained, lost = discordant(difference)
    return AccuracyDifference(distribution=distribution, gained=gained, lost=lost)


def discordant(difference: Array) -> tuple[int, int]:
    """Items gained and lost, each counted once over the seeds; [seeds, items]."""
    per_item = difference.sum(axis=0)
    return int((per_item > 0).sum()), int((per_item < 0).sum())
