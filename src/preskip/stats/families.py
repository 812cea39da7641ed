"""The family of comparisons that a run declares before training: its correction, and every verdict.

A family has a primary comparison (level 1) and secondary ones (level 2); before them comes whether the arm differs from
the plain model at all (level 0). A level is tested only if every comparison of the levels before it is decided, by
Holm's procedure within the level: serial gatekeeping (Maurer, Hothorn and Lehmacher 1995; Westfall and Krishen 2001;
Dmitrienko, Offen and Westfall 2003). The chance of any false difference is at most alpha. Equivalences are corrected by
Holm over all declared ones, without a gate: a primary comparison that is decided speaks against its own equivalence,
and would close the gate for all others. Families of earlier runs have one level, and leave equivalence uncorrected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from preskip.errors import PreskipError
from preskip.metrics import DEFAULT_MARGINS
from preskip.runs.schema import Comparison, Declared, Family, PairedDifference, SetFacts
from preskip.stats.looks import fractions_of, nominal_levels
from preskip.stats.verdicts import ALPHA, FEWEST_UNITS, independent_units, margin_of, verdict_of

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


def gatekeeping(p_values: Sequence[float], levels: Sequence[int]) -> list[float]:
    """p-values adjusted by serial gatekeeping: `holm` within a level, and never below any of the levels before it.

    Args:
        p_values: one raw p per test of the family.
        levels: of each test; the lowest is tested first.
    """
    adjusted, gate = [0.0] * len(p_values), 0.0
    for level in sorted(set(levels)):
        own = [place for place, other in enumerate(levels) if other == level]
        for place, value in zip(own, holm([p_values[place] for place in own]), strict=True):
            adjusted[place] = max(gate, value)
        gate = max(adjusted[place] for place in own)
    return adjusted


def first_questions(family: Family) -> list[Key]:
    """The comparisons at level 1, which the gate lets through first; none in families of one level."""
    return [key_of(entry) for entry in family.get("declared", ()) if entry.get("level") == 1]


def tests_beside(family: Family, entry: Declared) -> int:
    """How many tests share the level with a declared comparison, itself included; 1 for one that is not declared."""
    declared = family.get("declared", ())
    level = next((other.get("level", 1) for other in declared if key_of(other) == key_of(entry)), None)
    return max(1, sum(other.get("level", 1) == level for other in declared))


def levels_of(family: Family, entry: Declared, seeds: int) -> tuple[float, float]:
    """What a comparison's p-values are held to while none beside it is decided.

    Args:
        family: with its looks, where there are any.
        entry: one that is not declared is held to alpha.
        seeds: so many were trained; of several looks the last one that they reach counts, else the first.

    Returns:
        The two-sided level of the difference, alpha over the tests at its own level; and the one-sided level of
        equivalence, alpha over all declared ones that have a margin (families of earlier runs: alpha).
    """
    alpha, declared = family.get("alpha", ALPHA), family.get("declared", ())
    if key_of(entry) not in map(key_of, declared):
        return alpha, alpha
    difference = equivalence = alpha
    if family.get("procedure") == "gatekeeping":
        margins = family.get("margins", DEFAULT_MARGINS)
        equivalence /= max(1, sum(margin_of(margins, other["set"], other["metric"]) is not None for other in declared))
    difference /= tests_beside(family, entry)
    return levels_at(family.get("looks", ()), seeds, difference, equivalence)


def levels_at(looks: Sequence[int], seeds: int, difference: float, equivalence: float) -> tuple[float, float]:
    """What p is held to at the last look that so many seeds reach, else at the first; without looks, what is given.

    Args:
        looks: numbers of seeds, ascending.
        seeds: so many were trained.
        difference: two-sided level of all looks together.
        equivalence: the one-sided one of equivalence.
    """
    if not looks:
        return difference, equivalence
    fractions, place = fractions_of(looks), max(1, sum(look <= seeds for look in looks)) - 1
    return 2 * nominal_levels(difference / 2, fractions)[place], nominal_levels(equivalence, fractions)[place]


def apply_family(
    entries: Sequence[PairedDifference], family: Family, described: Mapping[str, SetFacts] | None = None
) -> list[Comparison]:
    """The entries of `compare` with `declared`, `p_holm` and `verdict`; see `verdict_of` for the rule.

    The correction counts every declared comparison. One that was not measured counts as p = 1, so that the family does
    not shrink after the fact; so does, where there is a gate, one of too few units. A declared pair may stand in either
    direction. Where looks were declared, the p-values that are corrected are those adjusted for looking (`looked`).

    Args:
        entries: from `compare`, whose `margins` must be the family's.
        family: {"declared": [{"arm", "reference", "set", "metric", "level"}], "alpha": 0.05, "margins": {metric:
            margin}, "procedure": "gatekeeping"}; all but the first may be left out.
        described: the evaluation sets as in run.json; a set's "higher_is_better" gives its metrics' directions.

    Raises:
        PreskipError: an entry was compared with another margin than the family states, or a comparison is declared or
            given twice.
    """
    alpha, margins = family.get("alpha", ALPHA), family.get("margins", DEFAULT_MARGINS)
    family_of = family.get("declared", ())
    declared = [key_of(entry) for entry in family_of]
    given = {key_of(entry): entry for entry in entries}
    if len(set(declared)) < len(declared) or len(given) < len(entries):
        raise PreskipError("a comparison occurs twice: declare and give each arm, reference, set and metric once")
    looked, gated = bool(family.get("looks")), family.get("procedure") == "gatekeeping"
    # What is of too few units to judge opens no gate.
    tested = {key: entry for key, entry in given.items() if not (gated and independent_units(entry) < FEWEST_UNITS)}
    p_values = [_p(tested.get(key), "p_value", looked) for key in declared]
    levels = [entry.get("level", 1) for entry in family_of]
    adjusted = dict(zip(declared, gatekeeping(p_values, levels), strict=True))
    equivalences: dict[Key, float] = {}
    if gated:
        judged = [key for key in declared if margin_of(margins, key[0], key[1]) is not None]
        p_values = [_p(tested.get(key), "p_equivalence", looked) for key in judged]
        equivalences = dict(zip(judged, holm(p_values), strict=True))
    result: list[Comparison] = []
    for entry in entries:
        margin = margin_of(margins, entry["set"], entry["metric"])
        if margin != entry["margin"]:
            raise PreskipError(
                f"{entry['metric']} on {entry['set']} was compared with margin {entry['margin']}, the family states "
                f"{margin}: give `compare` the family's margins"
            )
        key = key_of(entry)
        full: Comparison = {
            **entry,
            "declared": key in adjusted,
            "p_holm": adjusted.get(key),
            "verdict": "undecided",
        }
        if key in equivalences:
            full["p_equivalence_holm"] = equivalences[key]
        full["verdict"] = verdict_of(full, alpha, (described or {}).get(entry["set"]))
        result.append(full)
    return result


def _p(entry: PairedDifference | None, name: Literal["p_value", "p_equivalence"], looked: bool) -> float:
    """A p of an entry, of one with looks adjusted for them; 1 where it was not measured, or not looked at yet."""
    if entry is None or (looked and "looked" not in entry):
        return 1.0
    found = entry["looked"][name] if looked else entry[name]
    return 1.0 if found is None else found


def key_of(entry: Declared) -> Key:
    """What a comparison is known by, whichever way round it stands."""
    return entry["set"], entry["metric"], frozenset((entry["arm"], entry["reference"]))
