"""What the comparisons of a run can find: planned from assumed deviations, and from those that it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Literal, cast

from preskip.errors import PreskipError
from preskip.metrics import DEFAULT_MARGINS, metric_named
from preskip.runs.schema import Comparison, Declared, DesignFacts, Family, PairedDifference, PowerEntry, SetFacts
from preskip.stats.designs import POWER, Design, resolvable, resolvable_if_doubled
from preskip.stats.families import levels_of, tests_beside
from preskip.stats.verdicts import ALPHA, FEWEST_UNITS, independent_units, margin_of, units_of_variance


def planned_power(sets: Mapping[str, SetFacts], seeds: int, family: Family) -> list[PowerEntry]:
    """The `power` entries of a run before it is trained, one per declared comparison, from assumed deviations.

    Assumed: the deviations of `preskip.metrics`, half of the variance over units shared by all seeds. A metric without
    deviations has no figure.

    Args:
        sets: as in run.json: "kind" and "documents" or "items" of each set; "clusters" in their place where units are
            resampled in clusters; "unit_freedom" where sizes are known.
        seeds: training seeds.
        family: the declared family, which the levels are from (`levels_of`).

    Returns:
        {"set", "metric", "arm", "reference", "units", "seeds", "resolvable", "basis": "assumed", "alpha", "power",
        "family", "doubled", "decides_none", "design"}; "design" holds the deviations.

    Raises:
        PreskipError: a comparison is declared on a set that is not in `sets`.
    """
    declared = family.get("declared", ())
    entries = []
    for entry in declared:
        name, metric = entry["set"], entry["metric"]
        if name not in sets:
            raise PreskipError(f"the family declares a comparison on {name!r}, which the run does not evaluate")
        units = sets[name]["documents" if sets[name]["kind"] == "document" else "items"]
        clusters = sets[name].get("clusters") or units
        about = metric_named(metric)
        if about.unit_deviation is None:
            continue
        design = Design.assumed(
            units=units if clusters == 1 else clusters,  # as `units_of_variance`
            deviation=about.unit_deviation,
            seeds=seeds,
            seed_deviation=about.seed_deviation,
        )
        design = replace(design, unit_freedom=sets[name].get("unit_freedom"))
        margin = margin_of(family.get("margins", DEFAULT_MARGINS), name, metric)
        figures = _entry(entry, design, family, "assumed", margin)
        if clusters == 1:
            figures |= {"units": 1, "decides_none": 0.0}
        entries.append(figures)
    return entries


def decided(entry: PowerEntry, family: Family, difference: float) -> float:
    """Probability that a planned comparison decides anything (`Design.decides`).

    Args:
        entry: of `planned_power`.
        family: that it was planned for; a gate before the comparison is taken as open.
        difference: the true one, in the metric's unit.
    """
    if entry["units"] < FEWEST_UNITS:
        return 0.0
    margin = margin_of(family.get("margins", DEFAULT_MARGINS), entry["set"], entry["metric"])
    return Design(**entry["design"]).decides(difference, margin, *levels_of(family, entry, entry["seeds"]))


def measured_power(entries: Sequence[Comparison], family: Family) -> list[PowerEntry]:
    """The `power` entries of a run's results, one per comparison, from its measured variance components.

    Levels are those of `levels_of`, of secondary comparisons as if the primary one were decided. Where nothing differs
    at all, the figure is the half width of the interval, and what the comparison says is what it would decide.

    Args:
        entries: from `apply_family`.
        family: the declared family.
    """
    result = []
    for entry in entries:
        design = measured_design(entry)
        figures = _entry(entry, design, family, "measured", entry["margin"])
        if design.standard_error == 0:
            figures["resolvable"] = figures["doubled"] = (entry["high"] - entry["low"]) / 2
            figures["decides_none"] = float(entry["verdict"] == "equivalent")
        if independent_units(entry) < FEWEST_UNITS:
            figures["decides_none"] = 0.0
        result.append(figures)
    return result


def measured_design(entry: PairedDifference) -> Design:
    """The design of a comparison that was made, with its measured deviations."""
    parts, detail = entry["deviations"], entry.get("detail")
    return Design(
        units=units_of_variance(entry),
        seeds=entry["seeds"],
        unit_deviation=parts["unit"],
        residual_deviation=parts["residual"] or 0.0,
        seed_deviation=parts["seed"] or 0.0,
        unit_freedom=None if detail is None else detail["unit_freedom"],
    )


def _entry(
    comparison: Declared,
    design: Design,
    family: Family,
    basis: Literal["assumed", "measured"],
    margin: float | None,
) -> PowerEntry:
    level, of_equivalence = levels_of(family, comparison, design.seeds)
    return {
        "set": comparison["set"],
        "metric": comparison["metric"],
        "arm": comparison["arm"],
        "reference": comparison["reference"],
        "units": design.units,
        "seeds": design.seeds,
        "resolvable": resolvable(design, alpha=level),
        "doubled": resolvable_if_doubled(design, alpha=level),
        "decides_none": design.decides(0.0, margin, level, of_equivalence),
        "basis": basis,
        "alpha": family.get("alpha", ALPHA),
        "power": POWER,
        "family": tests_beside(family, comparison),
        "design": cast(DesignFacts, asdict(design)),
    }
