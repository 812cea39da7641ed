"""Differences of right/wrong answers, of which few items tell anything: limits that do not shrink with them.

After one item gained of 300 a bootstrap draws that item twice at most, and calls the arms equal within a point. So:

* No item differs: the exact (Clopper-Pearson 1934) upper limit of the rate at which items could, to both sides.
* At most 20 items differ: one item gained and one lost are added before the limits are computed (Bonett and Price
  2012; the same for each seed, each a cluster of its own), by Student's t, without the bootstrap's shape. Where all
  that differ go one way, the limit on that side is at least the exact one of their rate.
* More: `RatioDistribution` as it is.

The value is always that of the real items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from preskip.runs.schema import Deviations
from preskip.stats.bootstrap import RESAMPLES, RatioDistribution
from preskip.stats.inputs import Array, Labels
from preskip.stats.intervals import Distribution

FEW = 20


@dataclass(frozen=True)
class NothingDiffers(Distribution):
    """0/1 differences that are all zero: limits ± the exact upper bound of the rate at which units could differ."""

    units: int
    seeds: int
    value: float = 0.0

    @property
    def components(self) -> Deviations:
        """See `Distribution.components`."""
        return {"seed": None if self.seeds == 1 else 0.0, "unit": 0.0, "residual": None}

    def limit(self, tail: float, side: int) -> float:
        """See `Distribution.limit`."""
        return side * _rate_limit(0, self.units, tail)


@dataclass(frozen=True)
class FewDiffer(Distribution):
    """0/1 differences of which few are not zero; see the module's docstring.

    Args:
        plain: the distribution of the real items.
        extended: that of the items with one gained and one lost added.
        ups: units of which an item was gained in some seed, and none lost in any; None where some were lost.
        downs: the same of those lost.
    """

    plain: RatioDistribution
    extended: RatioDistribution
    ups: int | None
    downs: int | None

    @property
    def value(self) -> float:  # type: ignore[override]
        """The difference."""
        return self.plain.value

    @property
    def units(self) -> int:  # type: ignore[override]
        """Items or clusters."""
        return self.plain.units

    @property
    def seeds(self) -> int:  # type: ignore[override]
        """Training seeds."""
        return self.plain.seeds

    @property
    def components(self) -> Deviations:
        """See `Distribution.components`."""
        return self.plain.components

    @property
    def unit_freedom(self) -> float:
        """See `Distribution.unit_freedom`."""
        return self.plain.unit_freedom

    def limit(self, tail: float, side: int) -> float:
        """See `Distribution.limit`."""
        limits = [side * self.extended.limit(tail, side), side * self.value]
        one_way = self.ups if side > 0 else self.downs
        if one_way is not None:
            limits.append(_rate_limit(one_way, self.units, tail))
        return side * max(limits)


def distribution_of(
    difference: Array, clusters: Labels | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> Distribution:
    """The distribution of a difference of two accuracies.

    Args:
        difference: -1, 0 or 1, [seeds, items].
        clusters: as of `RatioDistribution`, as the rest.
        resamples: bootstrap replicates, default 9,999.
        seed: of the bootstrap, default 0.
    """
    plain = RatioDistribution(difference, np.ones_like(difference), clusters, resamples=resamples, seed=seed)
    gained, lost = np.any(difference > 0, axis=0), np.any(difference < 0, axis=0)
    if not (gained | lost).any():
        return NothingDiffers(units=plain.units, seeds=plain.seeds)
    if (gained | lost).sum() > FEW:
        return plain
    more = np.concatenate([difference, np.ones((len(difference), 1)), -np.ones((len(difference), 1))], axis=1)
    labels = None if clusters is None else [*(f"item:{label}" for label in clusters), "gained", "lost"]
    extended = RatioDistribution(more, np.ones_like(more), labels, resamples=resamples, seed=seed, shape=False)
    ups, downs = (None if other.any() else _units(own, clusters) for own, other in ((gained, lost), (lost, gained)))
    return FewDiffer(plain, extended, ups, downs)


def _units(chosen: NDArray[np.bool_], clusters: Labels | None) -> int:
    """How many units hold a chosen item."""
    return int(chosen.sum()) if clusters is None else len({str(label) for label in np.asarray(clusters)[chosen]})


def _rate_limit(found: int, units: int, tail: float) -> float:
    """Clopper and Pearson's upper limit of a rate; after 0 of n it is 1 - tail^(1/n)."""
    return 1.0 if found >= units else float(special.betaincinv(found + 1, units - found, 1 - tail))
