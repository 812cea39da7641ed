"""What the choice of a rate has of the spread over training seeds, from the rates that the searches have tried.

Where a rate is chosen anew for each seed (`--lr tune`), a difference varies over seeds for two reasons: the seed, and
that another rate was chosen. Each seed's last rung has the chosen rate and its neighbours, so what it would have
reached at the mean rate of its arm can be read off between them. How much less the seeds differ at that one rate than
at their own hints at what the choice adds; it may be less than nothing, and what is read off between two trainings
varies a little less than one training. All are development documents, after the steps of that rung.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypedDict

from preskip.runs.schema import Search, Trial
from preskip.stats.equal_harm import last_rung, worst_harm

# Seeds below which a deviation over them says nothing.
FEWEST = 3


class RateSpread(TypedDict):
    """Standard deviations over seeds of a difference between two arms, in bits per byte."""

    seeds: int
    own: float  # each seed at the rates that were chosen for it
    common: float  # all seeds at each arm's mean rate


def rate_spreads(arm: Search, reference: Search) -> dict[str, RateSpread]:
    """The spread of arm minus reference in-domain ("in") and of its worst loss out of domain ("out").

    Args:
        arm: its search, a rate by seed.
        reference: that of the other arm.

    Returns:
        Nothing for what fewer than three seeds of both arms tell: a seed does not where a rate that is needed diverged,
        was not scored out of domain, or lies beyond those that were tried for it.
    """
    found: dict[str, RateSpread] = {}
    for domain in ("in", "out"):
        mine, theirs = _at_both(arm, domain), _at_both(reference, domain)
        pairs = [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]
        if len(pairs) >= FEWEST:
            own, common = (
                statistics.stdev(of_arm[at] - of_reference[at] for of_arm, of_reference in pairs) for at in (0, 1)
            )
            found[domain] = {"seeds": len(pairs), "own": own, "common": common}
    return found


def _at_both(search: Search, domain: str) -> Mapping[str, tuple[float, float]]:
    """By training seed: the change at its own rate, and at the geometric mean of all seeds' rates."""
    rates = search.get("by_seed", {})
    if not rates:
        return {}
    mean = math.exp(statistics.fmean(map(math.log, rates.values())))
    found = {}
    for seed, trials in last_rung(search).items():
        if seed in rates:
            own, common = (change_at_rate(trials, rate, domain) for rate in (rates[seed], mean))
            if own is not None and common is not None:
                found[seed] = own, common
    return found


def change_at_rate(trials: Sequence[Trial], rate: float, domain: str) -> float | None:
    """What one seed changes at a rate: at one that was tried, or between two, linear in the rate's logarithm.

    Args:
        trials: of one seed and rung, in any order.
        rate: the learning rate.
        domain: "in", or "out" for the worst out-of-domain set.

    Returns:
        None beyond the rates that were tried, and where a neighbour diverged or has no such score.
    """
    points = [
        (math.log(trial["learning_rate"]), _change(trial, domain))
        for trial in sorted(trials, key=lambda trial: trial["learning_rate"])
    ]
    at = math.log(rate)
    for place, change in points:
        if math.isclose(place, at, abs_tol=1e-6):
            return change
    for (low, below), (high, above) in pairwise(points):
        if low < at < high:
            return None if below is None or above is None else below + (at - low) / (high - low) * (above - below)
    return None


def _change(trial: Trial, domain: str) -> float | None:
    dev = trial["dev"]
    if dev is None:
        return None
    if domain == "in":
        return dev["in"]["value"]
    return worst_harm(dev) if dev["out"] else None
