"""Where a run with declared looks will stop: the probability of a decision at each, simulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from scipy import special

from preskip.stats.bootstrap import LEAST, part_freedom, seeds_and_units_reach
from preskip.stats.designs import Design
from preskip.stats.looks import fractions_of, nominal_levels
from preskip.stats.verdicts import ALPHA, FEWEST_UNITS


class Stop(TypedDict):
    """What a planned look does."""

    seeds: int
    level: float  # two-sided, that p is held to at this look
    stops: float  # probability that the comparison is decided here and at no look before


def planned_stops(
    design: Design,
    difference: float,
    looks: Sequence[int],
    *,
    alpha: float = ALPHA,
    experiments: int = 20_000,
) -> list[Stop]:
    """The probability that a comparison is decided at each look, simulated with the test that is made.

    At every look the mean squares of seeds and of units are drawn, the latter once for all looks, since the units are
    the same; that of the residual, which has the most degrees of freedom, counts as known. See `RatioDistribution`.
    Of fewer than 6 units no verdict is given at any look.

    Args:
        design: the spreads and the units; its number of seeds is not used.
        difference: the true difference, in the metric's unit.
        looks: numbers of seeds, ascending, the first at least 2.
        alpha: two-sided level of all looks together. Default 0.05.
        experiments: simulated. Default 20,000: a standard error of at most 0.4 points.
    """
    levels = nominal_levels(alpha / 2, fractions_of(looks))
    if design.units < FEWEST_UNITS:
        return [{"seeds": look, "level": 2 * level, "stops": 0.0} for look, level in zip(looks, levels, strict=True)]
    generator = np.random.default_rng(0)
    unit_square, freedom = design.unit_deviation**2 / design.units, design.freedom_of_units
    own = np.sqrt(design.seed_deviation**2 + design.residual_deviation**2 / design.units)
    each = difference + own * generator.standard_normal((experiments, looks[-1]))
    shared = np.sqrt(unit_square) * generator.standard_normal(experiments)
    drawn = generator.chisquare(freedom, experiments) / freedom
    undecided = np.ones(experiments, bool)
    stops: list[Stop] = []
    for look, level in zip(looks, levels, strict=True):
        seen = each[:, :look]
        residual = design.residual_deviation**2 / (look * design.units)
        whole = np.maximum((unit_square + residual) * drawn, np.finfo(float).tiny)
        rest = np.minimum(1.0, residual / whole)
        reach = seeds_and_units_reach(
            level,
            seen.var(axis=1, ddof=1) / look,
            whole * (1 - rest),
            seed_freedom=look - 1,
            unit_freedom=freedom,
            part_freedom=part_freedom(freedom, rest, look),
        )
        t_rest = -special.stdtrit((look - 1) * (design.units - 1), level)
        reach = np.maximum(reach, LEAST * t_rest * np.sqrt(residual))
        found = undecided & (np.abs(seen.mean(axis=1) + shared) > reach)
        undecided &= ~found
        stops.append({"seeds": look, "level": 2 * level, "stops": float(found.mean())})
    return stops
