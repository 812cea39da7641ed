"""A value's sampling distribution as one-sided limits, and what is read from it: interval, p, equivalence."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from preskip.errors import PreskipError
from preskip.runs.schema import Deviations, MetricValue

CONFIDENCE = 0.95
SMALLEST_TAIL = 1e-100  # with one degree of freedom t is 3e99 there: its square must stay finite
_LIMIT_STEPS = 45


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with its interval.

    `units` is the number of resampled units (documents, items or clusters), `seeds` the number of training seeds. With
    one seed the interval says how the value varies over units and nothing about training randomness.
    """

    value: float
    low: float
    high: float
    confidence: float = CONFIDENCE
    units: int
    seeds: int = 1

    @property
    def excludes_zero(self) -> bool:
        """True when 0 lies outside [low, high]."""
        return self.low > 0 or self.high < 0

    def as_dict(self) -> MetricValue:
        """The interval as the run directory stores it."""
        return {"value": self.value, "low": self.low, "high": self.high, "confidence": self.confidence}


class Distribution(ABC):
    """A value's sampling distribution as one-sided limits; interval, p and equivalence are all read from those.

    So they agree by construction: the interval excludes a point exactly when its two-sided p is below 1 - confidence,
    and the interval of confidence 1 - 2α lies within ± margin exactly when the equivalence p is below α; down to
    `smallest_tail`, below which no p goes.
    """

    value: float
    units: int
    seeds: int

    @property
    @abstractmethod
    def components(self) -> Deviations:
        """Where the variance comes from, as standard deviations; a negative estimate is 0.

        Var(value) = seed² / seeds + unit² / units + residual² / (seeds · units). With one seed `unit` holds the
        residual too, and `seed` and `residual` are None: one seed cannot tell.
        """

    @property
    def unit_freedom(self) -> float:
        """Degrees of freedom of the variance over units."""
        return self.units - 1

    @property
    def smallest_tail(self) -> float:
        """The least one-sided p: 1e-100, and where there is no spread to judge by, that of a sign test."""
        return SMALLEST_TAIL

    @abstractmethod
    def limit(self, tail: float, side: int) -> float:
        """The limit with `tail` probability beyond it, 0 < tail ≤ 0.5; side -1 is the lower, +1 the upper."""

    def interval(self, confidence: float = CONFIDENCE) -> Interval:
        """The two-sided interval with equal tails.

        Raises:
            PreskipError: the confidence is not between 0 and 1.
        """
        if not 0 < confidence < 1:
            raise PreskipError(f"confidence {confidence!r} must lie between 0 and 1, such as 0.95")
        tail = (1 - confidence) / 2
        return Interval(
            value=self.value,
            low=self.limit(tail, -1),
            high=self.limit(tail, +1),
            confidence=confidence,
            units=self.units,
            seeds=self.seeds,
        )

    def tail_beyond(self, point: float) -> float:
        """One-sided p of the hypothesis that the truth lies at `point` or beyond, seen from the value; at most 0.5."""
        if self.value == point:
            return 0.5
        side = -1 if self.value > point else +1

        def excluded(tail: float) -> bool:
            return (self.limit(tail, side) - point) * side < 0

        low, high = math.log(self.smallest_tail), math.log(0.5)
        if excluded(self.smallest_tail):
            return self.smallest_tail
        if not excluded(0.5):
            return 0.5
        for _ in range(_LIMIT_STEPS):
            middle = (low + high) / 2
            if excluded(math.exp(middle)):
                high = middle
            else:
                low = middle
        return math.exp(high)

    def p_value(self, point: float = 0.0) -> float:
        """Two-sided p of the hypothesis that the truth is `point`; never 0, see `smallest_tail`."""
        return 2 * self.tail_beyond(point)

    def p_equivalence(self, margin: float) -> float:
        """p of two one-sided tests (Schuirmann 1987) against |truth| ≥ margin; small means equivalent.

        Raises:
            PreskipError: the margin is not positive.
        """
        if not margin > 0:
            raise PreskipError(f"margin {margin!r} must be positive: the largest difference that counts as none")
        beyond = [self.tail_beyond(-margin), self.tail_beyond(margin)]
        if self.value < -margin:
            beyond[0] = 1 - beyond[0]
        elif self.value > margin:
            beyond[1] = 1 - beyond[1]
        return max(beyond)
