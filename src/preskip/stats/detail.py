"""What stands beside a paired difference: each seed's own, where a new seed's would lie, and how often one arm wins."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from preskip.runs.schema import Detail, Deviations
from preskip.stats.bootstrap import LEAST, mean_squares
from preskip.stats.inputs import Array, Labels, ratio_inputs
from preskip.stats.intervals import CONFIDENCE

# Units up to which the signs are flipped: beyond, the shape of the resamples is known well.
MOST_FLIPPED = 40
_EXACT = 12  # units up to which every pattern of signs is counted
_FLIPS = 9_999


def detail_of(
    a: Array,
    b: Array,
    sizes: Array,
    clusters: Labels | None = None,
    *,
    unit_freedom: float | None = None,
    scale: float = 1.0,
    confidence: float = CONFIDENCE,
) -> Detail:
    """The `detail` of an entry of `compare`.

    Args:
        a: numerators of the arm, [seeds, units] or [1, units].
        b: the same of the reference.
        sizes: denominators, [units].
        clusters: a label per unit, or None.
        unit_freedom: degrees of freedom of the variance over units.
        scale: factor on the ratios.
        confidence: of the prediction interval.
    """
    by_seed = scale * (a - b).sum(1) / sizes.sum()
    scores = [scale * table.sum(1) / sizes.sum() for table in (a, b)]
    signs = np.sign(scores[0][:, None] - scores[1][None])
    above, below = ratio_inputs(a - b, sizes, clusters)
    return {
        "by_seed": by_seed.tolist(),
        "new_seed": new_seed(by_seed, confidence, least=_least(scale * above, below, confidence)),
        "probability_higher": float((1 + signs.mean()) / 2),
        "p_sign_flip": sign_flip(above.sum(0)) if above.shape[1] <= MOST_FLIPPED else None,
        "unit_freedom": unit_freedom,
    }


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student's interval for the mean of independent values, at least 2."""
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    reach = -float(special.stdtrit(len(values) - 1, (1 - confidence) / 2)) * error
    return mean - reach, mean + reach


def new_seed(by_seed: Array, confidence: float = CONFIDENCE, *, least: float = 0.0) -> list[float] | None:
    """Student's prediction interval for the difference that one more training seed would show on the same units:
    mean ± t · s · √(1 + 1 / seeds); None with one seed.

    Args:
        by_seed: the difference of each seed, [seeds].
        confidence: of the interval.
        least: half width below which it does not go. Default 0.
    """
    seeds = len(by_seed)
    if seeds < 2:
        return None
    t = -float(special.stdtrit(seeds - 1, (1 - confidence) / 2))
    reach = max(least, t * float(by_seed.std(ddof=1)) * math.sqrt(1 + 1 / seeds))
    return [float(by_seed.mean()) - reach, float(by_seed.mean()) + reach]


def _least(above: Array, below: Array, confidence: float) -> float:
    """Half of the half width that seed by unit alone leaves to one more seed, as of the interval over seeds: seeds that
    gain and lose different items in equal numbers agree by chance.

    LEAST · t · √((seeds + 1) · MS(residual)), since one seed's deviation is at least √(seeds · MS(residual)).

    Args:
        above: numerators of the difference, [seeds, units].
        below: denominators, [seeds, units].
        confidence: of the prediction interval.
    """
    seeds, units = above.shape
    if seeds < 2:
        return 0.0
    residual = mean_squares((above - above.sum() / below.sum() * below) / below.sum())[2]
    t = -float(special.stdtrit((seeds - 1) * (units - 1), (1 - confidence) / 2))
    return LEAST * t * math.sqrt((seeds + 1) * residual)


def sign_flip(totals: Array) -> float:
    """Two-sided p of a randomisation test: how often random signs of the units' totals sum to as much as their own.

    It needs no bootstrap and no normal law, only units that are independent, and under the hypothesis symmetric about
    0; it says nothing about training seeds. All patterns up to 12 units, else 9,999 random ones, of which the observed
    one counts as one more (Phipson and Smyth 2010): never 0.

    Args:
        totals: the difference summed in each unit, [units].
    """
    units = len(totals)
    observed = abs(totals.sum()) * (1 - 1e-12)
    if units <= _EXACT:
        patterns = 1 - 2 * ((np.arange(2 ** (units - 1))[:, None] >> np.arange(units)) & 1)
        return float(np.mean(np.abs(patterns @ totals) >= observed))
    patterns = np.random.default_rng(0).integers(0, 2, (_FLIPS, units)) * 2 - 1
    return float((1 + (np.abs(patterns @ totals) >= observed).sum()) / (1 + _FLIPS))


def variance_shares(deviations: Deviations, seeds: int, units: int) -> dict[str, float] | None:
    """The parts of the variance of a difference: training seeds, units, and seed by unit; None with one seed, which
    cannot tell them apart, and without variance.

    Args:
        deviations: `Distribution.components`.
        seeds: training seeds.
        units: independent units.
    """
    if seeds < 2 or deviations["seed"] is None:
        return None
    parts = {
        "seeds": deviations["seed"] ** 2 / seeds,
        "units": deviations["unit"] ** 2 / units,
        "both": (deviations["residual"] or 0.0) ** 2 / (seeds * units),
    }
    total = sum(parts.values())
    return {name: part / total for name, part in parts.items()} if total > 0 else None
