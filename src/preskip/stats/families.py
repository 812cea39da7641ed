"""The family of comparisons that a run declares before training: Holm's correction over it, and every verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from preskip.errors import PreskipError
from preskip.metrics import DEFAULT_MARGINS
from preskip.runs.schema import Comparison, Declared, Family, PairedDifference, SetFacts
from preskip.stats.verdicts import ALPHA, margin_of, verdict_of

Key = tuple[str, str, frozenset[str]]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p (Holm 1979), in the order given: reject where it is ≤ α to keep the chance of any
    false discovery in the family at α, whatever the dependence between the tests.

    Args:
        p_values: one raw p per test of the family.

    Raises:
        PreskipError: a p is not in [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise PreskipError("a p value is not between 0 and 1: a comparison failed, compute it again")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return [float(value) for value in adjusted]


def apply_family(
    entries: Sequence[PairedDifference], family: Family, described: Mapping[str, SetFacts] | None = None
) -> list[Comparison]:
    """The entries of `compare` with `declared`, `p_holm` and `verdict`; see `verdict_of` for the rule.

    Holm's correction counts every declared comparison. One that was not measured counts as p = 1, so that the family
    does not shrink after the fact. A declared pair may stand in either direction.

    Args:
        entries: from `compare`, whose `margins` must be the family's.
        family: {"declared": [{"arm", "reference", "set", "metric"}], "alpha": 0.05, "margins": {metric: margin}}; the
            last two may be left out.
        described: the evaluation sets as in run.json; a set's "higher_is_better" gives its metrics' directions.

    Raises:
        PreskipError: an entry was compared with another margin than the family states, or a comparison is declared or
            given twice.
    """
    alpha, margins = family.get("alpha", ALPHA), family.get("margins", DEFAULT_MARGINS)
    declared = [_key(entry) for entry in family.get("declared", ())]
    given = {_key(entry): entry for entry in entries}
    if len(set(declared)) < len(declared) or len(given) < len(entries):
        raise PreskipError("a comparison occurs twice: declare and give each arm, reference, set and metric once")
    p_values = [given[key]["p_value"] if key in given else 1.0 for key in declared]
    adjusted = dict(zip(declared, holm(p_values), strict=True))
    result: list[Comparison] = []
    for entry in entries:
        margin = margin_of(margins, entry["set"], entry["metric"])
        if margin != entry["margin"]:
            raise PreskipError(
                f"{entry['metric']} on {entry['set']} was compared with margin {entry['margin']}, the family states "
                f"{margin}: give `compare` the family's margins"
            )
        key = _key(entry)
        full: Comparison = {
            **entry,
            "declared": key in adjusted,
            "p_holm": adjusted.get(key),
            "verdict": "undecided",
        }
        full["verdict"] = verdict_of(full, alpha, (described or {}).get(entry["set"]))
        result.append(full)
    return result


def _key(entry: Declared) -> Key:
    return entry["set"], entry["metric"], frozenset((entry["arm"], entry["reference"]))
