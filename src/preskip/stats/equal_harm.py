"""What arms gain in-domain at one and the same harm out of domain, from the rates that their searches have tried.

`--lr-rule frontier` compares arms at an equal *allowed* harm: each has the best rate of a grid that stays within it,
so by chance of the grid they end at different harms. Here the most that is gained for up to that harm is read off the
last rung, for each training seed: at a rate that was tried, or, where the harm passes the limit between two
neighbouring rates, interpolated between them. Where the limit binds, no rate is chosen, so none is chosen too well;
where it does not, the best of the rates tried counts, which flatters an arm of which more were tried. All are measured
on development documents, after the steps of that rung.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypedDict

from scipy import stats

from preskip.runs.schema import Development, Search, Trial
from preskip.stats.detail import t_interval
from preskip.stats.intervals import CONFIDENCE

Changes = Mapping[str, float | None]


class MeanDifference(TypedDict):
    """A mean over seeds, its Student's interval and p; what other documents would give is not in them."""

    value: float
    low: float
    high: float
    p_value: float


def changes_at(search: Search, harm: float) -> dict[str, float | None]:
    """By training seed: the best in-domain change in bits per byte for up to a harm (`change_at`).

    Args:
        search: of an arm; its trials of the last rung count.
        harm: bits per byte by which the worst out-of-domain set of development documents is above the untouched model.

    Returns:
        None for a seed whose rates do not tell.
    """
    return {seed: change_at(trials, harm) for seed, trials in last_rung(search).items()}


def last_rung(search: Search) -> dict[str, list[Trial]]:
    """By training seed: the trials of a search's last rung."""
    # Both rungs of a very short run have as many steps.
    last = max((trial["rung"], trial["steps"]) for trial in search["trace"])
    by_seed: dict[str, list[Trial]] = {}
    for trial in search["trace"]:
        if (trial["rung"], trial["steps"]) == last:
            by_seed.setdefault(str(trial.get("for_seed", trial["seed"])), []).append(trial)
    return by_seed


def change_at(trials: Sequence[Trial], harm: float) -> float | None:
    """The best in-domain change of one seed for up to a harm: at a rate, or between two, linear in the harm.

    None where every rate does more harm, or the highest is the best of those that do not: a higher one might be better
    still.
    """
    points = [_point(trial) for trial in sorted(trials, key=lambda trial: trial["learning_rate"])]
    within = {at: point[1] for at, point in enumerate(points) if point is not None and point[0] <= harm}
    passing = []
    for one, other in pairwise(points):
        if one is not None and other is not None and (one[0] <= harm) != (other[0] <= harm):
            share = (harm - one[0]) / (other[0] - one[0])
            passing.append(one[1] + share * (other[1] - one[1]))
    if not within or min(within, key=within.__getitem__) == len(points) - 1:
        return None
    return min([*within.values(), *passing])


def _point(trial: Trial) -> tuple[float, float] | None:
    """Harm and in-domain change; None where training diverged, or nothing was scored out of domain."""
    dev = trial["dev"]
    return None if dev is None or not dev["out"] else (worst_harm(dev), dev["in"]["value"])


def worst_harm(dev: Development) -> float:
    """Bits per byte that the worst out-of-domain set of development documents loses against the untouched model."""
    return max(limits["value"] for limits in dev["out"].values())


def mean_difference(own: Changes, other: Changes, *, confidence: float = CONFIDENCE) -> MeanDifference | None:
    """The change of an arm minus that of another, over the seeds that both have; None for fewer than two of them."""
    pairs = [(change, other.get(seed)) for seed, change in own.items()]
    differences = [change - rival for change, rival in pairs if change is not None and rival is not None]
    if len(differences) < 2:
        return None
    low, high = t_interval(differences, confidence)
    return {
        "value": sum(differences) / len(differences),
        "low": low,
        "high": high,
        "p_value": float(stats.ttest_1samp(differences, 0).pvalue),
    }
