"""How small a difference a design finds, and how many items and seeds find a given one.

A comparison's error has three parts, as in `bootstrap`: Var = seed² / seeds + unit² / units + residual² / (seeds ·
units). The smallest difference found is the one whose two-sided test at α rejects with the wanted power. With one seed
that test is Student's t over units; with several it is the rule of `seeds_and_units_reach`. Its power is the normal
probability of exceeding the half width, averaged over what the mean squares of the units and of so few seeds may be.
Degrees of freedom over units are the test's own, fewer than units - 1 where sizes differ. A comparison decides when it
reads better, worse or equivalent; of fewer than 6 independent units it never does.
As a rule of thumb it is 2.8 standard errors with one seed and many units; where the seeds dominate 5.7 with three seeds
and 3.8 with five.

One seed knows nothing of the seeds' part; then the figure says what its items resolve about these trained weights, and
not about the method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from preskip.errors import PreskipError
from preskip.stats.bootstrap import seeds_and_units_reach
from preskip.stats.inputs import Array
from preskip.stats.verdicts import ALPHA, FEWEST_UNITS

POWER = 0.8
_MANY = 25  # degrees of freedom from which the units' own uncertainty no longer moves the power
MOST_UNITS, MOST_SEEDS = 10_000_000, 1_000
SHARED = 0.5  # of the variance over units, assumed common to all seeds


@dataclass(frozen=True, kw_only=True)
class Design:
    """A paired comparison that is planned or was made.

    Args:
        units: documents, items or clusters that both arms are scored on.
        seeds: training seeds. Default 1.
        unit_deviation: standard deviation over units of the difference that all seeds share, in the metric's unit.
        residual_deviation: standard deviation of what one seed adds on one unit. Default 0.
        seed_deviation: standard deviation over seeds of the whole difference. Default 0; not used with one seed.
        unit_freedom: degrees of freedom of the variance over units. Default: units - 1, right for equal sizes.
    """

    units: int
    unit_deviation: float
    seeds: int = 1
    residual_deviation: float = 0.0
    seed_deviation: float = 0.0
    unit_freedom: float | None = None

    def __post_init__(self) -> None:
        if self.units < 2:
            raise PreskipError(f"{self.units} units are too few for an interval: plan at least 2")
        if self.seeds < 1:
            raise PreskipError(f"{self.seeds} seeds: plan at least 1")
        for name in ("unit_deviation", "residual_deviation", "seed_deviation"):
            if not 0 <= getattr(self, name) < np.inf:
                raise PreskipError(f"{name.replace('_', ' ')} {getattr(self, name)!r} must be 0 or more")

    @classmethod
    def assumed(
        cls, *, units: int, deviation: float, seeds: int = 1, seed_deviation: float = 0.0, shared: float = SHARED
    ) -> Design:
        """A design from one seed's standard deviation over units, of whose variance all seeds share the part `shared`.

        For accuracies `deviation` is √discordant: see `discordant_deviation`.
        """
        if not 0 <= shared <= 1:
            raise PreskipError(
                f"shared {shared!r} must lie between 0 and 1: the variance that all seeds have in common"
            )
        return cls(
            units=units,
            seeds=seeds,
            unit_deviation=deviation * shared**0.5,
            residual_deviation=deviation * (1 - shared) ** 0.5,
            seed_deviation=seed_deviation,
        )

    @property
    def standard_error(self) -> float:
        """Standard deviation of the measured difference."""
        return float(np.sqrt(self._seed_square + self._unit_square))

    @property
    def freedom_of_units(self) -> float:
        """Degrees of freedom of the variance over units."""
        return self.units - 1 if self.unit_freedom is None else self.unit_freedom

    def of_units(self, count: int) -> Design:
        """The design with another number of units, of sizes as unequal as its own."""
        freedom = self.unit_freedom
        if freedom is not None:
            freedom = max(1.0, freedom * (count - 1) / max(1, self.units - 1))
        return replace(self, units=count, unit_freedom=freedom)

    @property
    def _seed_square(self) -> float:
        """What the mean square of seeds estimates; 0 with one seed."""
        if self.seeds == 1:
            return 0.0
        return self.seed_deviation**2 / self.seeds + self.residual_deviation**2 / (self.seeds * self.units)

    @property
    def _unit_square(self) -> float:
        own = self.residual_deviation**2 if self.seeds == 1 else 0.0
        return (self.unit_deviation**2 + own) / self.units

    def power(self, difference: float, alpha: float = ALPHA) -> float:
        """Probability that a true `difference` (in the metric's unit) is found at level `alpha`, two-sided.

        With one seed "true" means for the weights that this seed trained.
        """
        if self.standard_error == 0:
            return 1.0 if difference != 0 else alpha
        return float(np.mean(self._found(difference, self._reach(alpha / 2))))

    def decides(
        self, difference: float, margin: float | None, alpha: float = ALPHA, equivalence_alpha: float = ALPHA
    ) -> float:
        """Probability that the comparison decides anything: better, worse, or equivalent.

        Args:
            difference: the true one, in the metric's unit.
            margin: of equivalence, or None where none is stated.
            alpha: level of the two-sided test.
            equivalence_alpha: level of the two one-sided tests.
        """
        if self.units < FEWEST_UNITS:
            return 0.0
        error = self.standard_error
        if error == 0:
            return 1.0 if difference != 0 or margin is not None else 0.0
        reach = self._reach(alpha / 2)
        found = self._found(difference, reach)
        if margin is not None:
            within = np.maximum(0.0, margin - self._reach(equivalence_alpha))
            equal = special.ndtr((within - difference) / error) - special.ndtr((-within - difference) / error)
            found = np.where(within >= reach, 1.0, found + equal)
        return float(np.mean(found))

    def _found(self, difference: float, reach: Array) -> Array:
        """Probability that the measured difference lies beyond each half width."""
        error = self.standard_error
        return np.asarray(special.ndtr((difference - reach) / error) + special.ndtr((-difference - reach) / error))

    def _reach(self, tail: float) -> Array:
        """Equally likely half widths of the test, as the mean squares vary."""
        freedom = self.freedom_of_units
        if self.seeds == 1:
            t = -special.stdtrit(freedom, tail)
            return np.asarray(t * np.sqrt(self._unit_square * _chi(freedom, 400)))
        # Of many units the mean square is as good as known.
        of_units = _chi(freedom, 40) if freedom < _MANY else np.ones(1)
        reach = seeds_and_units_reach(
            tail,
            self._seed_square * _chi(self.seeds - 1, 400)[:, None],
            self._unit_square * of_units,
            seed_freedom=self.seeds - 1,
            unit_freedom=freedom,
        )
        return np.asarray(reach).ravel()


@dataclass(frozen=True, kw_only=True)
class Needed:
    """How many units at the design's seeds, and how many seeds at its units, find a difference; None: none does."""

    units: int | None
    seeds: int | None


def _chi(freedom: float, count: int) -> Array:
    """Equally likely values of a mean square over its expectation."""
    return np.asarray(special.chdtri(freedom, (np.arange(count) + 0.5) / count) / freedom)


def discordant_deviation(discordant: float) -> float:
    """Standard deviation of a paired 0/1 difference when that share of items differs: √discordant.

    Raises:
        PreskipError: the share is not above 0 and at most 1.
    """
    if not 0 < discordant <= 1:
        raise PreskipError(f"discordant {discordant!r} must be a share of items above 0 and at most 1, such as 0.1")
    return float(np.sqrt(discordant))


def resolvable(design: Design, *, power: float = POWER, alpha: float = ALPHA) -> float:
    """The smallest true difference that the design finds, in the metric's unit.

    Args:
        design: the comparison.
        power: probability of finding it. Default 0.8.
        alpha: two-sided level of this comparison. Default 0.05.

    Raises:
        PreskipError: power or alpha out of range.
    """
    level = checked_level(power, alpha)
    error = design.standard_error
    if error == 0:
        return 0.0
    reach, low, high = design._reach(level / 2), 0.0, error
    while np.mean(design._found(high, reach)) < power:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if np.mean(design._found(middle, reach)) >= power else (middle, high)
    return high


def needed(design: Design, difference: float, *, power: float = POWER, alpha: float = ALPHA) -> Needed:
    """The fewest units (at the design's seeds) and the fewest seeds (at its units) that find `difference`.

    Args:
        design: the comparison; its own units and seeds are replaced in turn.
        difference: the true difference to find, in the metric's unit, not 0.
        power: probability of finding it. Default 0.8.
        alpha: two-sided level of this comparison. Default 0.05.

    Returns:
        None for units when no number up to ten million is enough, because the seeds' part remains; None for seeds when
        1,000 are not enough, because the units' part remains, or when the design knows nothing of the seeds' part (one
        seed and no `seed_deviation`).

    Raises:
        PreskipError: the difference is 0, or as `resolvable`.
    """
    level = checked_level(power, alpha)
    if difference == 0 or not np.isfinite(difference):
        raise PreskipError(f"difference {difference!r}: give the true difference to find, not 0")

    def fewest(smallest: int, largest: int, change: Callable[[int], Design]) -> int | None:
        if change(largest).power(difference, level) < power:
            return None
        low, high = smallest - 1, largest
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if change(middle).power(difference, level) >= power else (middle, high)
        return high

    units = fewest(FEWEST_UNITS, MOST_UNITS, design.of_units)
    seeds = None
    if design.seeds > 1 or design.seed_deviation > 0:
        seeds = fewest(2, MOST_SEEDS, lambda count: replace(design, seeds=count))
    return Needed(units=units, seeds=seeds)


def doubled(design: Design) -> Design:
    """The design if the difference of each seed on these units varies twice as much as it says; of one seed it is the
    same.

    That deviation is √(seed² + residual² / units), so twice it is something where the seeds' own part was estimated as
    0, too: seed² becomes 4 · seed² + 3 · residual² / units.
    """
    by_units = 3 * design.residual_deviation**2 / design.units
    return replace(design, seed_deviation=float(np.sqrt(4 * design.seed_deviation**2 + by_units)))


def resolvable_if_doubled(design: Design, *, power: float = POWER, alpha: float = ALPHA) -> float:
    """`resolvable` of `doubled`, at least that of the design itself: with hardly any degrees of freedom over units the
    interval gains some by a part of the variance that has more of them.
    """
    return max(resolvable(each, power=power, alpha=alpha) for each in (design, doubled(design)))


def checked_level(power: float, alpha: float, family: int = 1) -> float:
    """alpha / family, where power, alpha and family are in range."""
    for name, value in (("power", power), ("alpha", alpha)):
        if not 0 < value < 1:
            raise PreskipError(f"{name} {value!r} must lie between 0 and 1")
    if power <= alpha:
        raise PreskipError(f"power {power:g} must be greater than alpha {alpha:g}")
    if family < 1:
        raise PreskipError(f"family {family!r} must be 1 or more comparisons")
    return alpha / family
