"""One estimate over several experiments, such as models and corpora, whose truths may differ: random effects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

from preskip.errors import PreskipError
from preskip.runs.schema import Comparison, SetFacts
from preskip.stats.intervals import CONFIDENCE
from preskip.stats.power import measured_design
from preskip.stats.verdicts import flipped


@dataclass(frozen=True, kw_only=True)
class Combined:
    """The mean truth over experiments, and how far they are from one another.

    Attributes:
        value: the mean, experiments weighted by 1 / (own variance + between²).
        low, high: its interval; another draw of experiments is in it.
        confidence: its level.
        p_value: two-sided, of a mean of 0.
        between: standard deviation of the truths, in the value's unit.
        predicted_low, predicted_high: where the truth of one more experiment lies; None with two experiments.
        experiments: how many there are.
        standard_error: of the value.
    """

    value: float
    low: float
    high: float
    confidence: float
    p_value: float
    between: float
    predicted_low: float | None
    predicted_high: float | None
    experiments: int
    standard_error: float

    def p_equivalence(self, margin: float) -> float:
        """p of two one-sided tests against |mean| ≥ margin."""
        freedom = self.experiments - 1
        return float(stats.t.sf((margin - abs(self.value)) / self.standard_error, freedom))


def combine(values: Sequence[float], standard_errors: Sequence[float], *, confidence: float = CONFIDENCE) -> Combined:
    """A random-effects mean: Paule and Mandel's variance between experiments, Hartung and Knapp's interval.

    The factor of Hartung and Knapp is at least 1 (Röver et al. 2015), so that experiments which agree by chance do not
    narrow the interval below the one of a common truth. The prediction interval is that of Higgins et al. (2009), with
    t of k - 2. Experiments are taken as independent draws. Two models on two corpora are four runs but not four such
    draws: where models or corpora differ in truth the interval is too narrow.

    Args:
        values: the difference that each experiment found, in one unit.
        standard_errors: of each, positive.
        confidence: level, default 0.95.

    Raises:
        PreskipError: fewer than two experiments, or a standard error that is not a positive number.
    """
    found, errors = np.asarray(values, float), np.asarray(standard_errors, float)
    count = len(found)
    if count < 2:
        raise PreskipError("one experiment cannot be combined: give two runs or more")
    if not (np.isfinite(found).all() and np.isfinite(errors).all() and (errors > 0).all()):
        raise PreskipError("an experiment without a positive standard error cannot be combined")
    variances = errors**2

    def excess(between: float) -> float:
        """Cochran's Q with weights for this variance, minus what it is expected to be."""
        weights = 1 / (variances + between)
        mean = weights @ found / weights.sum()
        return float(weights @ (found - mean) ** 2 - (count - 1))

    between = 0.0
    if excess(0.0) > 0:
        highest = float(np.ptp(found) ** 2)
        while excess(highest) > 0:
            highest *= 2
        between = float(optimize.brentq(excess, 0.0, highest, xtol=1e-18, rtol=1e-12))
    weights = 1 / (variances + between)
    mean = float(weights @ found / weights.sum())
    factor = max(1.0, float(weights @ (found - mean) ** 2) / (count - 1))
    error = math.sqrt(factor / weights.sum())
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * error
    predicted = None
    if count > 2:
        spread = math.sqrt(between + 1 / weights.sum())
        predicted = float(stats.t.ppf((1 + confidence) / 2, count - 2)) * spread
    return Combined(
        value=mean,
        low=mean - half,
        high=mean + half,
        confidence=confidence,
        p_value=float(2 * stats.t.sf(abs(mean) / error, count - 1)),
        between=math.sqrt(between),
        predicted_low=None if predicted is None else mean - predicted,
        predicted_high=None if predicted is None else mean + predicted,
        experiments=count,
        standard_error=error,
    )


def combine_comparisons(
    runs: Mapping[str, tuple[Sequence[Comparison], Mapping[str, SetFacts]]],
    *,
    confidence: float = CONFIDENCE,
    notes: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Each pair of arms over the runs that hold it, by metric and by whether the text was in-domain.

    What is combined is the role and not the set: the in-domain text of a run on WikiText and that of a run on books.
    Several sets of one role in a run count as one experiment, their mean, with the mean of their standard errors, as if
    they were fully dependent.

    Args:
        runs: comparisons and the description of the sets, by name of the run. A pair that runs hold in opposite
            directions has that of the first.
        confidence: level, default 0.95.
        notes: where to note a pair that two runs or more hold, and that has a spread in fewer.

    Returns:
        Those that two runs or more hold, `role` being "in", "out", or the name of a set that no run describes. A run
        of which no item differs has the standard error of its limits; one whose difference has no width is named in
        `left_out`. `margin` is the narrowest of the runs', None where one has none.
    """
    groups: dict[tuple[str, str, str, str], dict[str, list[Comparison]]] = {}
    directions: dict[frozenset[str], tuple[str, str]] = {}
    for run, (comparisons, sets) in runs.items():
        for entry in comparisons:
            pair = (entry["arm"], entry["reference"])
            first = directions.setdefault(frozenset(pair), pair)
            role = sets[entry["set"]]["domain"] if entry["set"] in sets else entry["set"]
            group = groups.setdefault((*first, entry["metric"], role), {})
            group.setdefault(run, []).append(entry if pair == first else flipped(entry))
    found: list[dict[str, Any]] = []
    for (arm, reference, metric, role), by_run in groups.items():
        values, errors, left_out = [], [], []
        parts: list[dict[str, Any]] = []
        for run, entries in by_run.items():
            own = [_standard_error(entry) for entry in entries]
            if min(own) > 0:
                values.append(sum(entry["difference"] for entry in entries) / len(entries))
                errors.append(sum(own) / len(own))
                parts += [{"run": run, "comparison": entry} for entry in entries]
            else:
                left_out.append(run)
        if len(values) < 2:
            if notes is not None and len(by_run) > 1:
                where = {"in": "in-domain", "out": "out-of-domain"}.get(role, role)
                notes.append(
                    f"{arm} and {reference}, {metric}, {where}: no spread in {', '.join(left_out)}; not combined"
                )
            continue
        mean = combine(values, errors, confidence=confidence)
        margins = [part["comparison"]["margin"] for part in parts]
        margin = None if None in margins else min(margins)
        found.append(
            {
                "arm": arm,
                "reference": reference,
                "metric": metric,
                "role": role,
                **asdict(mean),
                "margin": margin,
                "p_equivalence": None if margin is None else mean.p_equivalence(margin),
                "parts": parts,
                "left_out": left_out,
            }
        )
    return found


def _standard_error(entry: Comparison) -> float:
    """As its deviations have it; of accuracies that differ in nothing, what its limits are a normal interval of."""
    measured = measured_design(entry).standard_error
    half = (entry["high"] - entry["low"]) / 2
    return measured or half / float(stats.norm.ppf((1 + entry["confidence"]) / 2))
