"""Exact tests on discordant items, and Holm's correction for several tests at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats as scipy_stats

from preskip.errors import PreskipError


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


def rate_bound(units: int, confidence: float) -> float:
    """Clopper-Pearson upper limit of a rate after 0 of `units`."""
    return float(1 - ((1 - confidence) / 2) ** (1 / units))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p (Holm 1979), in the order given: reject where it is ≤ α to keep the chance of any
    false discovery in the family at α, whatever the dependence between the tests.

    Args:
        p_values: one raw p per test of the family.

    Raises:
        PreskipError: a p is not in [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise PreskipError("a p value is not between 0 and 1: a comparison failed, compute it again")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(value) for value in adjusted]
