"""What arms change in-domain at one and the same harm out of domain, from the rates that their searches have tried.

`--lr-rule frontier` compares arms at an equal *allowed* harm: each has the best rate of a grid that stays within it,
so by chance of the grid they end at different harms. Here the in-domain change is interpolated, for each training
seed, between the two neighbouring rates of the last rung where the harm passes the limit. No rate is chosen, so none
is chosen too well; but all are measured on development documents, after the steps of that rung.
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
    """By training seed: the in-domain change in bits per byte where the harm passes a limit.

    Args:
        search: of an arm; its trials of the last rung count.
        harm: bits per byte by which the worst out-of-domain set of development documents is above the untouched model.

    Returns:
        None for a seed of which no two neighbouring rates enclose the harm.
    """
    longest = max(trial["steps"] for trial in search["trace"])
    by_seed: dict[str, list[Trial]] = {}
    for trial in search["trace"]:
        if trial["steps"] == longest:
            by_seed.setdefault(str(trial.get("for_seed", trial["seed"])), []).append(trial)
    return {seed: change_at(trials, harm) for seed, trials in by_seed.items()}


def change_at(trials: Sequence[Trial], harm: float) -> float | None:
    """The in-domain change at a harm, linear between the rates below and above it; of several pairs the highest."""
    points = [_point(trial) for trial in sorted(trials, key=lambda trial: trial["learning_rate"])]
    for below, above in reversed(list(pairwise(points))):
        if below is not None and above is not None and below[0] <= harm < above[0]:
            share = (harm - below[0]) / (above[0] - below[0])
            return below[1] + share * (above[1] - below[1])
    return None


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
