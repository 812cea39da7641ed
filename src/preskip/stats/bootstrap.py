"""The sampling distribution of a ratio of sums, by resampling units and adding what the training seeds contribute.

Everything reported is a ratio of sums over units, Σ numerator / Σ denominator: bits per byte (nats over bytes), the
difference of two arms on the same documents (difference of nats over bytes), accuracy (correct over items), and the
logarithm of word perplexity (nats over words). So one distribution serves all of them, and clusters are sums.

* Units: BCa bootstrap (Efron 1987) of the ratio, n - 1 of n units drawn so that the variance of a mean is unbiased
  (Rao and Wu 1988), each tail level widened from the normal to Student's t with units - 1 degrees of freedom
  (Hesterberg 2015), since percentiles of a few dozen documents are too narrow; fewer, and a factor near 1, where units
  differ in size (see `of_unequal_sizes`). Beyond the levels that the resamples reach, limits grow in proportion to
  that t. With one seed this is the whole distribution.
* Few units: a handful has few distinct resamples. Below 20 degrees of freedom a limit is therefore never nearer than
  the cluster-robust one, t with Bell and McCaffrey's degrees of freedom (2002) times the unbiased standard error; and
  where sizes are so unequal that less than two thirds of units - 1 are left, it is that one alone.
* Several seeds: seeds and units are crossed (every seed is scored on the same documents). Drawing both with replacement
  counts what is particular to one seed on one document up to three times (Owen 2007), and two or three seeds have no
  percentiles worth the name. So the seeds enter through the mean squares of a two-way analysis of variance instead:
  variance of the ratio = A + B, A = MS(seeds), B = MS(units) - MS(residual), all over seeds · units. B keeps the shape
  that the bootstrap found. The half width is the root of the mean of two squares, of Satterthwaite's t · √(A + B) and
  of √(t²·A + t²·B), t with each mean square's own degrees of freedom (Howe 1974; Graybill and Wang 1980). With three
  seeds and many units the first alone covers as little as 92.2 %, the second alone as much as 97.7 %; together 94.3 to
  96.7 %, whatever the ratio of A to B. Two seeds: 93.7 to 98.2 %; five: 94.9 to 95.8 %. In truth A + B is
  never less than MS(residual), so a half width is never less than half of t · √MS(residual): answers are right or
  wrong, and seeds that gain and lose different items in equal numbers would leave a width of 0. Where all variance is
  the residual's, 300 answers of three seeds are then covered by 96.7 %; by 99 % with the whole of it.

The bootstrap is written out because `scipy.stats.bootstrap` has no widened levels and calls the statistic on
materialised resamples; as a ratio of sums one matrix of counts does it, and equal units are drawn as one multinomial
count. Tests hold it against SciPy's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from preskip.errors import PreskipError
from preskip.runs.schema import Deviations
from preskip.stats.inputs import Array, Labels, ratio_inputs
from preskip.stats.intervals import CONFIDENCE, SMALLEST_TAIL, Distribution, Interval

RESAMPLES = 9_999
_CELLS_PER_CHUNK = 4_000_000  # counts held at once: 32 MB as floats
_EDGE = 10  # resamples in a tail below which a percentile is not trusted
LEAST = 0.5  # of the half width from the residual alone, which no interval over seeds is narrower than
_FEW = 20  # degrees of freedom of the units below which their resamples have too little shape


class RatioDistribution(Distribution):
    """Σ numerator / Σ denominator over units, and over seeds where there are several. See the module's docstring.

    The order of units and of seeds does not change anything.

    Args:
        numerator: [units] or [seeds, units].
        denominator: positive, [units] or [seeds, units].
        clusters: a label per unit, such as its document; whole clusters are then the units. None: units are
            independent.
        scale: factor on all values, 1 / ln 2 for bits. Default 1.
        resamples: bootstrap replicates. Default 9,999.
        seed: of the bootstrap's own generator. Default 0.
        shape: take the limits' shape from the resamples; without it they are Student's t alone. Default True.

    Raises:
        PreskipError: NaN, unequal lengths, a denominator that is not positive, fewer than 2 units, fewer than 100
            resamples.
    """

    def __init__(
        self,
        numerator: ArrayLike,
        denominator: ArrayLike,
        clusters: Labels | None = None,
        *,
        scale: float = 1.0,
        resamples: int = RESAMPLES,
        seed: int = 0,
        shape: bool = True,
    ) -> None:
        above, below = ratio_inputs(numerator, denominator, clusters)
        if resamples < 100:
            raise PreskipError(
                f"resamples {resamples!r} is too few for an interval: use 100 or more (default {RESAMPLES})"
            )
        above = above * scale
        self.seeds, self.units = above.shape
        self.value = float(above.sum() / below.sum())
        residual = (above - self.value * below) / below.sum()  # first-order influence of each cell on the ratio
        by_unit = residual.sum(0)
        self._unit_freedom, self._stretch = of_unequal_sizes(below.sum(0) / below.sum())
        self._seed_square, self._unit_square, self._residual_square = mean_squares(residual)
        self._unit_square *= self._stretch
        tiny = (1e-13 * max(1.0, abs(self.value))) ** 2
        self.is_constant = self._seed_square + self._unit_square + self._residual_square <= tiny
        if self.is_constant:
            self._seed_square = self._unit_square = self._residual_square = 0.0
            if abs(self.value) < 1e-12:  # rounding of arms that do not differ, not a difference without error
                self.value = 0.0
            return
        self._is_shaped = shape and self._unit_freedom >= min(_FEW, 2 * (self.units - 1) / 3)
        if not self._is_shaped:
            return
        self._replicates = np.sort(_replicates(above.sum(0), below.sum(0), resamples, seed))
        under = float(np.mean(self._replicates < self.value) + 0.5 * np.mean(self._replicates == self.value))
        self._bias = float(special.ndtri(min(max(under, 0.5 / resamples), 1 - 0.5 / resamples)))
        spread = float((by_unit**2).sum())
        # Seeds alone differ (every unit alike): there is no shape to correct for.
        self._acceleration = float((by_unit**3).sum() / (6 * spread**1.5)) if spread > tiny else 0.0

    @property
    def unit_freedom(self) -> float:
        """Degrees of freedom of the variance over units: units - 1, fewer where their sizes differ."""
        return self._unit_freedom

    @property
    def components(self) -> Deviations:
        """See `Distribution.components`."""
        if self.seeds == 1:
            return {"seed": None, "unit": math.sqrt(self._unit_square * self.units), "residual": None}
        return {
            "seed": math.sqrt(max(0.0, self._seed_square - self._residual_square) * self.seeds),
            "unit": math.sqrt(max(0.0, self._unit_square - self._residual_square) * self.units),
            "residual": math.sqrt(self._residual_square * self.seeds * self.units),
        }

    @property
    def smallest_tail(self) -> float:
        """See `Distribution.smallest_tail`: 2^-units where every unit shows the same difference."""
        return max(SMALLEST_TAIL, 2.0**-self.units) if self.is_constant else SMALLEST_TAIL

    def limit(self, tail: float, side: int) -> float:
        """See `Distribution.limit`."""
        if self.is_constant:
            return self.value
        t_units = -float(special.stdtrit(self._unit_freedom, tail))
        if not math.isfinite(t_units):  # SciPy's quantile of few degrees of freedom has an end
            return side * math.inf
        reach = self._one_sided(t_units, side)
        if self.seeds > 1:
            # The units' own part of the variance, with the length that the bootstrap gives this side.
            rest = min(1.0, self._residual_square / self._unit_square) if self._unit_square > 0 else 1.0
            unit_square = (reach / t_units) ** 2 * (1 - rest) if t_units > 0 else 0.0
            reach = float(
                seeds_and_units_reach(
                    tail,
                    self._seed_square,
                    unit_square,
                    seed_freedom=self.seeds - 1,
                    unit_freedom=self._unit_freedom,
                    part_freedom=part_freedom(self._unit_freedom, rest, self.seeds),
                )
            )
            t_rest = -float(special.stdtrit((self.seeds - 1) * (self.units - 1), tail))
            reach = max(reach, LEAST * t_rest * math.sqrt(self._residual_square))
        return self.value + side * (reach if math.isfinite(reach) else math.inf)

    def _one_sided(self, t_units: float, side: int) -> float:
        """Half width from the units alone, on one side."""
        robust = t_units * math.sqrt(self._unit_square)
        if not self._is_shaped:
            return robust
        resampled = max(0.0, side * self._unit_reach(side * t_units)) * math.sqrt(self._stretch)
        return max(resampled, robust) if self._unit_freedom < _FEW else resampled

    def _unit_reach(self, z: float) -> float:
        """Signed distance from the value to the BCa limit at the normal score `z`."""
        edge = _EDGE / len(self._replicates)
        level = self._level(z)
        inside = min(max(level, edge), 1 - edge)
        distance = _quantile(self._replicates, inside) - self.value
        if inside == level:
            return distance
        # The score whose level is at the edge: BCa's correction inverted.
        shifted = float(special.ndtri(inside)) - self._bias
        z_edge = shifted / (1 + self._acceleration * shifted) - self._bias
        return distance * z / z_edge if z_edge * z > 0 else distance

    def _level(self, z: float) -> float:
        shifted = self._bias + z
        stretch = 1 - self._acceleration * shifted
        # Beyond the pole of the correction the level is at its extreme.
        if stretch <= 0:
            return 1.0 if shifted > 0 else 0.0
        return float(special.ndtr(self._bias + shifted / stretch))


def part_freedom(unit_freedom: float, rest: float | Array, seeds: int) -> Array:
    """Satterthwaite's degrees of freedom of MS(units) - MS(residual), `rest` being the latter over the former, ≤ 1."""
    return np.maximum(unit_freedom * (1 - rest) ** 2 / (1 + rest**2 / (seeds - 1)), np.finfo(float).tiny)


def seeds_and_units_reach(
    tail: float,
    seed_square: float | Array,
    unit_square: float | Array,
    *,
    seed_freedom: float,
    unit_freedom: float,
    part_freedom: float | Array | None = None,
) -> float | Array:
    """Half width of the interval from a seed part and a unit part of the variance; see the module's docstring.

    Args:
        tail: probability beyond the limit.
        seed_square: MS(seeds) / (seeds · units).
        unit_square: (MS(units) - MS(residual)) / (seeds · units), at least 0.
        seed_freedom: degrees of freedom of MS(seeds), seeds - 1.
        unit_freedom: degrees of freedom of MS(units), units - 1.
        part_freedom: degrees of freedom of the difference `unit_square`, as Satterthwaite counts them. Default:
            `unit_freedom`, right when the residual is 0.
    """
    total = seed_square + unit_square
    if not np.any(total > 0):
        return 0.0
    uncertainty = seed_square**2 / seed_freedom
    if np.any(unit_square > 0):
        uncertainty = uncertainty + unit_square**2 / (unit_freedom if part_freedom is None else part_freedom)
    freedom = np.maximum(total**2 / uncertainty, min(seed_freedom, unit_freedom))
    t_both, t_seeds, t_units = (special.stdtrit(df, tail) for df in (freedom, seed_freedom, unit_freedom))
    return np.sqrt((t_both**2 * total + t_seeds**2 * seed_square + t_units**2 * unit_square) / 2)


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    scale: float = 1.0,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The interval of `RatioDistribution`, with its arguments, at a level `confidence`."""
    return RatioDistribution(numerator, denominator, scale=scale, resamples=resamples, seed=seed).interval(confidence)


def mean_squares(residual: Array) -> tuple[float, float, float]:
    """Mean squares of seeds, units and residual over seeds · units, from influences that sum to 0; [seeds, units]."""
    seeds, units = residual.shape
    by_seed, by_unit = residual.sum(1), residual.sum(0)
    of_units = float((by_unit**2).sum() * units / (units - 1))
    if seeds == 1:
        return 0.0, of_units, 0.0
    of_seeds = float((by_seed**2).sum() * seeds / (seeds - 1))
    rest = float((residual**2).sum() - (by_seed**2).sum() / units - (by_unit**2).sum() / seeds)
    return of_seeds, of_units, max(0.0, rest) * seeds * units / ((seeds - 1) * (units - 1))


def of_unequal_sizes(shares: Array) -> tuple[float, float]:
    """Degrees of freedom of the units' variance, and the factor that makes it unbiased, from each unit's share of size.

    For units whose own ratios have equal variance: a few large ones leave fewer degrees of freedom than units - 1, and
    pull the ratio towards themselves, which hides part of their deviation. Satterthwaite's degrees of freedom of the
    sum of squared influences, tr(M)² / tr(M²) with M their covariance, as Bell and McCaffrey (2002) take them. Equal
    sizes give units - 1 and 1.

    Args:
        shares: positive, sum 1, [units].
    """
    units, squares = len(shares), shares**2
    total = squares.sum()
    # M_gh = s_g s_h (δ_gh - s_g - s_h + Σ s²), summed without the matrix.
    cubes, fourths = (shares**3).sum(), (squares**2).sum()
    own = squares * (1 - 2 * shares + total)
    diagonal = (squares**2 * (total - 2 * shares) ** 2).sum()
    all_pairs = 2 * total * fourths + 2 * cubes**2 + total**4 - 4 * total**2 * cubes
    freedom = own.sum() ** 2 / ((own**2).sum() + all_pairs - diagonal)
    seen = own.sum() / total
    return max(1.0, float(freedom)), max(1.0, float((units - 1) / (units * seen)))


def _quantile(ordered: Array, level: float) -> float:
    place = level * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 2)
    return float(ordered[below] + (place - below) * (ordered[below + 1] - ordered[below]))


def _replicates(above: Array, below: Array, resamples: int, seed: int) -> Array:
    """The ratio in each resample, [resamples]."""
    # Sorted by content, so that the order in which units arrive cannot change which of them a draw picks.
    order = np.lexsort((below, above))
    table = np.stack([above[order], below[order]], axis=1)  # [units, 2]
    fresh = np.concatenate([[True], (table[1:] != table[:-1]).any(axis=1)])
    starts = np.flatnonzero(fresh)
    units = len(table)
    if 4 * len(starts) <= units:  # few kinds of unit, as with right/wrong answers: how often each kind is drawn
        sizes = np.diff([*starts, units])
        generator = np.random.default_rng(seed)
        sums = generator.multinomial(units - 1, sizes / units, size=resamples) @ table[starts]
    else:
        sums = np.concatenate([counts @ table for counts in _counts(seed, resamples, units)])
    return sums[:, 0] / sums[:, 1]


def _counts(seed: int, resamples: int, units: int) -> Iterator[Array]:
    """How often each unit is drawn, in chunks of [resamples, units]."""
    chunk = max(1, _CELLS_PER_CHUNK // units)
    for number, start in enumerate(range(0, resamples, chunk)):
        yield _drawn(seed, number, min(chunk, resamples - start), units).astype(np.float64)


@lru_cache(maxsize=16)
def _drawn(seed: int, chunk: int, size: int, units: int) -> NDArray[np.uint16]:
    """One chunk of counts; kept, because the many comparisons of a run share their units. At most 8 MB each."""
    drawn = np.random.default_rng((seed, chunk)).integers(units, size=(size, units - 1))
    offsets = np.arange(size)[:, None] * units
    counts = np.bincount((drawn + offsets).ravel(), minlength=size * units)
    return counts.reshape(size, units).astype(np.uint16)
