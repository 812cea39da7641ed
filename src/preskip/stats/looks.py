"""Looks at a run while seeds are added: what each may spend of the level, and p-values adjusted for looking.

The level is spent as Lan and DeMets's O'Brien-Fleming-like function says: by the share t of the planned seeds one-sided
α(t) = 2 − 2·Φ(z / √t), with z = Φ⁻¹(1 − α/2). Early looks spend next to nothing, so the last one loses little. The
statistics of the looks are those of a Brownian motion at t, whose passage over the limits is integrated look by look
(Armitage, McPherson and Rowe 1969). What items share over all seeds makes looks more alike than that, and the true
error smaller. Two-sided tests are two one-sided ones at half the level.

Lan and DeMets, Biometrika 70 (1983); Jennison and Turnbull, Group Sequential Methods (2000), chapters 7 and 9. A p over
looks, to which any procedure over several comparisons applies: Liu and Anderson, JASA 103 (2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from preskip.stats.inputs import Array

# Nodes of the integral over one look, and the lowest value of the statistic that it counts.
NODES, LOWEST = 160, -8.0
# One-sided levels between which p-values are interpolated, evenly in z.
LEVELS = special.ndtr(np.linspace(-8.0, 0.0, 81))


def spent(level: float, fraction: float) -> float:
    """How much of a one-sided level may be spent by a look at a share of the planned seeds, 0 to 1."""
    return float(2 * special.ndtr(special.ndtri(level / 2) / np.sqrt(fraction)))


def nominal_levels(level: float, fractions: Sequence[float]) -> list[float]:
    """The one-sided level that p is held to at each look, so that all looks together have `level`.

    Args:
        level: one-sided, above 0 and at most 0.5.
        fractions: share of the planned seeds at each look, ascending, the last one 1.
    """
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    found: list[float] = []
    before, used = 0.0, 0.0
    places, mass = np.zeros(1), np.ones(1)  # where the statistic is that has not passed yet, and with what probability
    for fraction in fractions:
        step = np.sqrt(fraction - before)
        wanted = spent(level, fraction) - used

        def passes(limit: float, places: Array = places, mass: Array = mass, step: float = step) -> float:
            return float(mass @ special.ndtr((places - limit) / step))

        highest = -LOWEST * 5 * np.sqrt(fraction)
        if wanted <= passes(highest):
            limit = highest
        else:
            limit = optimize.brentq(lambda at: passes(at) - wanted, LOWEST * np.sqrt(fraction), highest, xtol=1e-12)  # noqa: B023
        found.append(float(special.ndtr(-limit / np.sqrt(fraction))))
        low = LOWEST * np.sqrt(fraction)
        here = (limit - low) / 2 * nodes + (limit + low) / 2
        density = np.exp(-(((here[:, None] - places) / step) ** 2) / 2) / (step * np.sqrt(2 * np.pi))
        places, mass = here, (density @ mass) * weights * (limit - low) / 2
        before, used = fraction, used + wanted
    return found


@lru_cache(maxsize=16)
def _table(fractions: tuple[float, ...]) -> Array:
    """z of the nominal level of each look, [levels, looks]."""
    return special.ndtri([nominal_levels(level, fractions) for level in LEVELS])


def sequential_p(p_values: Sequence[ArrayLike], fractions: Sequence[float]) -> Array:
    """The smallest one-sided level at which one of the looks so far would have decided.

    Args:
        p_values: one-sided, one number or array per look so far.
        fractions: as `nominal_levels`, of all planned looks.
    """
    table, z = _table(tuple(fractions)), special.ndtri(LEVELS)
    found = [
        np.where(special.ndtri(p) > own[-1], 1.0, special.ndtr(np.interp(special.ndtri(p), own, z)))
        for p, own in zip(map(np.asarray, p_values), table.T, strict=False)
    ]
    return np.min(found, axis=0)


def two_sided(p_values: Sequence[ArrayLike], fractions: Sequence[float]) -> Array:
    """`sequential_p` of two-sided p-values."""
    return np.minimum(1.0, 2 * sequential_p([np.asarray(p) / 2 for p in p_values], fractions))


def fractions_of(looks: Sequence[int]) -> list[float]:
    """The share of the planned seeds at looks after so many seeds each."""
    return [look / looks[-1] for look in looks]
