"""What a design resolves: published figures, statsmodels, and simulated experiments."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from preskip.errors import PreskipError
from preskip.stats import (
    Design,
    RatioDistribution,
    apply_family,
    compare,
    measured_power,
    needed,
    planned_power,
    resolvable,
)
from preskip.stats.designs import checked_level, discordant_deviation, doubled, resolvable_if_doubled
from stored_runs import make_items


def accuracy_design(items: int, **options: float) -> Design:
    return Design.assumed(units=items, deviation=discordant_deviation(0.1), **options)


def test_full_lambada_resolves_1_2_points_and_500_items_4() -> None:
    assert resolvable(accuracy_design(5153)) == pytest.approx(0.0123, abs=5e-5)
    assert resolvable(accuracy_design(500)) == pytest.approx(0.0397, abs=5e-5)


@pytest.mark.parametrize("units", [8, 40, 900, 4000])
def test_one_seed_agrees_with_the_power_of_the_t_test(units: int) -> None:
    power = pytest.importorskip("statsmodels.stats.power")
    for alpha in (0.05, 0.05 / 21):
        expected = power.TTestPower().solve_power(nobs=units, power=0.8, alpha=alpha)
        ours = resolvable(Design(units=units, unit_deviation=2.0), alpha=alpha)
        assert ours == pytest.approx(2 * expected, rel=1e-3)


DESIGNS = [
    Design(units=40, unit_deviation=1.0),
    Design(units=40, seeds=3, seed_deviation=1.0, unit_deviation=3.0, residual_deviation=3.0),
    Design(units=40, seeds=3, seed_deviation=1.0, unit_deviation=0.5, residual_deviation=0.5),
    Design(units=100, seeds=5, seed_deviation=0.3, unit_deviation=2.0, residual_deviation=2.0),
]


@pytest.mark.parametrize("design", DESIGNS, ids=["one seed", "mixed", "seeds dominate", "five seeds"])
def test_the_resolvable_difference_is_found_in_four_of_five_experiments(design: Design) -> None:
    difference, found = resolvable(design), 0
    for experiment in range(2_000):
        generator = np.random.default_rng(experiment)
        values = (
            difference
            + (design.seeds > 1) * design.seed_deviation * generator.standard_normal((design.seeds, 1))
            + design.unit_deviation * generator.standard_normal(design.units)
            + design.residual_deviation * generator.standard_normal((design.seeds, design.units))
        )
        distribution = RatioDistribution(values, np.ones(design.units), resamples=499, seed=experiment % 16)
        found += distribution.interval(0.95).excludes_zero
    assert found / 2_000 == pytest.approx(0.8, abs=0.03)


def test_needed_is_the_least_number_that_resolves_the_difference() -> None:
    design = accuracy_design(500, seeds=3, seed_deviation=0.005)
    found = needed(design, 0.03)
    assert found.units is not None
    assert found.seeds is not None
    for enough, change in ((found.units, "units"), (found.seeds, "seeds")):
        options = {"units": 500, "seeds": 3, change: enough}
        fewer = {**options, change: enough - 1}
        assert resolvable(accuracy_design(seed_deviation=0.005, items=options["units"], seeds=options["seeds"])) <= 0.03
        assert resolvable(accuracy_design(seed_deviation=0.005, items=fewer["units"], seeds=fewer["seeds"])) > 0.03
    # No number of items makes up for seeds that differ by more, nor seeds for items.
    assert needed(accuracy_design(500, seeds=3, seed_deviation=0.05), 0.03).units is None
    assert needed(accuracy_design(500, seeds=3), 0.001).seeds is None
    assert needed(accuracy_design(500), 0.03).seeds is None


def test_a_larger_family_resolves_less() -> None:
    design = accuracy_design(1500, seeds=5, seed_deviation=0.003)
    figures = [resolvable(design, alpha=0.05 / size) for size in (1, 5, 20)]
    assert figures == sorted(figures)
    assert figures[2] > 1.5 * figures[0]


def test_planned_power_per_declared_comparison() -> None:
    sets = {
        "heldout": {"kind": "document", "documents": 60},
        "lambada": {"kind": "item", "items": 5153},
        "books": {"kind": "document", "documents": 500, "clusters": 10},
    }
    declared = [
        {"arm": "preskip", "reference": "none", "set": name, "metric": metric}
        for name, metric in (
            ("heldout", "bits_per_byte"),
            ("lambada", "acc"),
            ("lambada", "f1"),
            ("books", "bits_per_byte"),
        )
    ]
    bits, accuracy, books = planned_power(sets, 1, {"declared": declared})
    assert accuracy["resolvable"] == pytest.approx(resolvable(accuracy_design(5153), alpha=0.05 / 4))
    assert bits["resolvable"] == pytest.approx(resolvable(Design(units=60, unit_deviation=0.025), alpha=0.05 / 4))
    assert accuracy.items() >= {"units": 5153, "seeds": 1, "basis": "assumed", "family": 4, "power": 0.8}.items()
    assert books["units"] == 10
    # Sizes that are known leave fewer degrees of freedom before anything is trained, too.
    uneven = planned_power({**sets, "books": {**sets["books"], "unit_freedom": 3.5}}, 1, {"declared": declared[3:]})
    even = planned_power(sets, 1, {"declared": declared[3:]})
    assert uneven[0]["design"]["unit_freedom"] == 3.5
    assert uneven[0]["resolvable"] > 1.2 * even[0]["resolvable"]
    with pytest.raises(PreskipError, match="'piqa', which the run does not evaluate"):
        planned_power(sets, 1, {"declared": [{**declared[0], "set": "piqa"}]})


def test_measured_power_uses_the_components_of_the_run() -> None:
    cells = {seed: make_items(seed, documents=30, shift=-0.01 * seed) for seed in (1, 2, 3, 4)}
    family = {"declared": [{"arm": "a", "reference": "none", "set": "heldout", "metric": "bits_per_byte"}]}
    entries = apply_family(compare(cells, {0: make_items(9, documents=30)}, arm="a", reference="none"), family)
    bits, accuracy, _ = measured_power(entries, family)
    parts = entries[0]["deviations"]
    expected = Design(
        units=30,
        seeds=4,
        unit_deviation=parts["unit"],
        seed_deviation=parts["seed"],
        residual_deviation=parts["residual"],
        unit_freedom=entries[0]["detail"]["unit_freedom"],
    )
    assert expected.unit_freedom < 29  # documents differ in size
    assert bits["resolvable"] == pytest.approx(resolvable(expected))
    # Shifts of .01 nats per byte and seed: a deviation of .0129 / ln 2 over the four.
    assert parts["seed"] == pytest.approx(np.std([1, 2, 3, 4], ddof=1) * 0.01 / np.log(2), rel=0.2)
    assert (bits["basis"], accuracy["units"]) == ("measured", 30)
    # An arm against itself: no spread, so what the interval says.
    same = apply_family(compare(cells, cells, arm="a", reference="b"), family)
    measured = measured_power(same, family)
    for figure in ("resolvable", "doubled"):
        assert [e[figure] for e in measured] == [0.0, pytest.approx(same[1]["high"]), 0.0]
    assert same[1]["detail"]["new_seed"] is None  # that no answer differs bounds no other seed's
    # Of 30 items none differs, which does not show that less than a point of all would.
    assert [e["verdict"] for e in same] == ["equivalent", "undecided", "equivalent"]
    assert [e["decides_none"] for e in measured] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("deviations", [(0.012, 0.004, 0.002), (0.003, 0.002, 0.0005)], ids=["units", "mixed"])
def test_unequal_clusters_have_the_power_that_is_claimed(deviations: tuple[float, float, float]) -> None:
    # Books of 5, 13, 5 and 17 pieces, at the level of a family of 9: with 3 degrees of freedom it claimed three times
    # as small a difference, which was found in 5 to 16 % of experiments.
    sizes, (of_units, of_both, of_seeds) = np.array([5.0, 13, 5, 17]), deviations
    scale = 2 * np.sqrt(((sizes / sizes.sum()) ** 2).sum())  # of the sum's variance, to that of four equal units
    known = RatioDistribution(sizes * np.arange(4.0), sizes).unit_freedom
    assert known == pytest.approx(1.728, abs=1e-3)
    deviation = {"unit_deviation": of_units * scale, "residual_deviation": of_both * scale, "seed_deviation": of_seeds}
    design = Design(units=4, seeds=3, unit_freedom=known, **deviation)
    difference, found = resolvable(design, alpha=0.05 / 9), 0
    assert difference > 2 * resolvable(Design(units=4, seeds=3, **deviation), alpha=0.05 / 9)
    for experiment in range(500):
        generator = np.random.default_rng(experiment)
        values = (
            difference
            + of_seeds * generator.standard_normal((3, 1))
            + of_units * generator.standard_normal(4)
            + of_both * generator.standard_normal((3, 4))
        )
        found += RatioDistribution(sizes * values, sizes).interval(1 - 0.05 / 9).excludes_zero
    assert found / 500 == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("true", [0.0, 0.45])
def test_the_probability_that_a_run_decides_is_that_of_simulated_ones(true: float) -> None:
    design = Design(units=40, seeds=3, seed_deviation=0.1, unit_deviation=0.5, residual_deviation=0.5)
    decided = 0
    for experiment in range(1_500):
        generator = np.random.default_rng(experiment)
        values = (
            true
            + 0.1 * generator.standard_normal((3, 1))
            + 0.5 * generator.standard_normal(40)
            + 0.5 * generator.standard_normal((3, 40))
        )
        distribution = RatioDistribution(values, np.ones(40), resamples=499, seed=experiment % 16)
        narrow = distribution.interval(0.90)  # within the margin where both one-sided tests reject
        decided += distribution.interval(0.95).excludes_zero or -0.35 <= narrow.low <= narrow.high <= 0.35
    assert design.decides(true, 0.35) == pytest.approx(decided / 1_500, abs=0.035)
    assert 0.3 < design.decides(true, 0.35) < 0.95


def test_few_units_decide_nothing_and_doubled_seeds_resolve_less() -> None:
    options = {"seeds": 3, "unit_deviation": 0.01, "seed_deviation": 0.01}
    assert Design(units=5, **options).decides(1.0, 0.5) == 0.0
    assert Design(units=6, **options).decides(1.0, 0.5) > 0.9
    design = Design(units=60, **options)
    assert resolvable(doubled(design)) == pytest.approx(2 * resolvable(design), rel=0.05)
    assert 0.3 < doubled(design).power(resolvable(design)) < 0.4
    # What is doubled is what one reads off the seeds' points, also where the seeds' own part was estimated as 0.
    for own in (0.0, 0.01):
        noisy = replace(design, seed_deviation=own, residual_deviation=0.05)
        spread, twice = (math.hypot(each.seed_deviation, 0.05 / math.sqrt(60)) for each in (noisy, doubled(noisy)))
        assert twice == pytest.approx(2 * spread)
        assert resolvable(doubled(noisy)) > resolvable(noisy)


def test_seeds_that_vary_more_never_resolve_more() -> None:
    # Four unequal books: 1.6 degrees of freedom, to which the seeds' part adds its own.
    design = Design(units=4, seeds=3, unit_deviation=0.03, seed_deviation=0.004, unit_freedom=1.6)
    assert resolvable(doubled(design)) < resolvable(design) == resolvable_if_doubled(design)
    many = replace(design, units=60, unit_freedom=None)
    assert resolvable_if_doubled(many) == resolvable(doubled(many)) > resolvable(many)


def test_bad_designs_are_refused_with_one_line() -> None:
    design = Design(units=10, unit_deviation=1.0)
    cases = [
        (lambda: Design(units=1, unit_deviation=1.0), "1 units are too few"),
        (lambda: Design(units=10, seeds=0, unit_deviation=1.0), "plan at least 1"),
        (lambda: Design(units=10, unit_deviation=-1.0), "unit deviation -1.0 must be 0 or more"),
        (lambda: Design.assumed(units=10, deviation=1.0, shared=2), "shared 2 must lie between"),
        (lambda: discordant_deviation(10), "discordant 10 must be a share"),
        (lambda: resolvable(design, power=80), "power 80 must lie between"),
        (lambda: resolvable(design, power=0.04), "greater than alpha"),
        (lambda: checked_level(0.8, 0.05, 0), "family 0"),
        (lambda: needed(design, 0), "difference 0"),
    ]
    for call, message in cases:
        with pytest.raises(PreskipError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
