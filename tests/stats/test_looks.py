"""Limits of looks against published tables and SciPy, p-values over looks, and the family's error with both."""

import json

import numpy as np
import pytest
from scipy import special, stats

from preskip.stats import Design, compare_arms, looks_without_seeds
from preskip.stats.bootstrap import RatioDistribution
from preskip.stats.families import gatekeeping, holm
from preskip.stats.looks import fractions_of, nominal_levels, sequential_p, spent, two_sided
from preskip.stats.stops import planned_stops
from stored_runs import invoke_app


def limits(level, fractions):
    return -special.ndtri(nominal_levels(level, fractions))


def test_limits_are_those_of_published_tables():
    # Two-sided 5 %, five equal looks: DeMets and Lan (1994), table of the O'Brien-Fleming-like function; R's ldbounds.
    assert limits(0.025, [0.2, 0.4, 0.6, 0.8, 1.0]) == pytest.approx([4.877, 3.357, 2.680, 2.290, 2.031], abs=6e-4)
    # Three equal looks: R's gsDesign, sfLDOF.
    assert limits(0.025, [1 / 3, 2 / 3, 1.0]) == pytest.approx([3.7103, 2.5114, 1.9930], abs=1e-4)
    assert limits(0.025, [1.0]) == pytest.approx([1.959964], abs=1e-5)


@pytest.mark.parametrize("level", [0.005, 0.025, 0.05])
def test_the_looks_together_spend_the_level_by_scipy(level):
    """The probability that a multivariate normal stays below all limits; correlations √(t_i / t_j)."""
    fractions = np.array(fractions_of([3, 5, 8]))
    correlation = np.sqrt(np.minimum.outer(fractions, fractions) / np.maximum.outer(fractions, fractions))
    found = limits(level, list(fractions))
    for count in (1, 2, 3):
        inside = stats.multivariate_normal.cdf(found[:count], cov=correlation[:count, :count], abseps=1e-8, releps=1e-8)
        passed = 1 - inside
        assert passed == pytest.approx(spent(level, fractions[count - 1]), rel=0.003)
    assert spent(level, 1.0) == pytest.approx(level)


def test_p_over_looks_is_the_level_at_which_a_look_decides():
    fractions = fractions_of([3, 5, 8])
    for level in (0.001, 0.025, 0.2):
        own = nominal_levels(level, fractions)
        for look in range(3):
            before = [0.9] * look
            assert sequential_p([*before, own[look]], fractions) == pytest.approx(level, rel=2e-3)
    # An early finding stays, what comes later can only add to it, and one look less than planned is never too sure.
    assert two_sided([1e-7, 0.9], fractions) == two_sided([1e-7], fractions) > 1e-7
    assert two_sided([0.9, 0.9, 0.04], fractions) == pytest.approx(0.0424, abs=2e-4)
    assert two_sided([1.0, 1.0, 1.0], fractions) == 1.0
    assert two_sided([0.0], fractions) > 0
    assert two_sided([0.03], [1.0]) == pytest.approx(0.03, rel=2e-3)


def grown(by_seed, looks=(3, 5)):
    """The only comparison of a run with looks: each seed's difference, alike on 40 documents."""
    spread = 1e-4 * np.linspace(-1, 1, 40)

    def records(difference):
        nll = np.log(2) * (1000 + 100 * (difference + spread))
        return [
            {
                "set": "text",
                "kind": "document",
                "id": f"{place:02}",
                "nll": value,
                "tokens": 1,
                "bytes": 100,
                "words": 1,
            }
            for place, value in enumerate(nll)
        ]

    items = {"none": {1: records(0 * spread)}, "arm": {seed: records(own) for seed, own in enumerate(by_seed, 1)}}
    pair = {"arm": "arm", "reference": "none", "set": "text", "metric": "bits_per_byte", "level": 1}
    margins = {"bits_per_byte": 0.005}
    family = {"declared": [pair], "procedure": "gatekeeping", "alpha": 0.05, "margins": margins, "looks": [*looks]}
    (entry,) = compare_arms(items, family)
    return entry


def test_a_look_counts_only_where_all_seeds_agree_with_it():
    # Better at the first look; the mean over five is on the other side of 0, which no look has shown.
    early = [-0.0100, -0.0101, -0.0099]
    assert grown(early)["verdict"] == "better"
    assert grown([*early, -0.005, 0.002])["verdict"] == "better"  # an early finding stays
    turned = grown([*early, 0.05, 0.06])
    assert turned["difference"] > 0
    assert turned["verdict"] == "undecided"
    assert turned["p_holm"] > turned["p_value"]  # of the last look alone, with what the first one may spend
    # Equivalent at the first look; the mean over five is beyond the margin.
    alike = [0.0, 0.0001, -0.0001]
    assert grown(alike)["verdict"] == "equivalent"
    beyond = grown([*alike, 0.02, 0.03])
    assert beyond["difference"] > beyond["margin"]
    assert (beyond["verdict"], beyond["p_equivalence_holm"]) == ("undecided", 1.0)


def test_a_look_that_may_spend_next_to_nothing_leaves_the_others_theirs():
    """Of looks at 2 and 30 seeds the first has a level of 1e-18, at which a confidence rounds to 1."""
    differences = -0.01 + 1e-4 * np.sin(np.arange(30))
    assert nominal_levels(0.025, [2 / 30, 1])[0] < 1e-17
    for looks in ([2, 30], [2, 25, 30]):
        early, last = grown(differences, looks), grown(differences, [29, 30])
        assert early["verdict"] == last["verdict"] == "better"
        assert early["looked"]["seeds"] == 30
    assert grown(differences[:2], [2, 30])["verdict"] == "undecided"


def test_a_look_that_lacks_a_seed_is_told():
    """Seed 2 of lora diverged: the look at 3 seeds is of none that was seen then, that at 5 is not reached."""
    pairs = [{"arm": "content", "reference": other, "set": name, "metric": "bits_per_byte"}
             for other in ("none", "lora") for name in ("text", "far")]  # fmt: skip
    family = {"declared": pairs, "looks": [3, 5]}
    items = {"none": {1: []}, "content": {seed: [] for seed in range(1, 6)}, "lora": {1: [], 3: [], 4: [], 5: []}}
    told = "content and lora: seed 2 is missing, so "
    at_five = ["the look at 3 seeds is of 1, 3, 4", "the look at 5 seeds is not reached"]
    assert looks_without_seeds(items, family, [1, 2, 3, 4, 5]) == [told + " and ".join(at_five)]
    assert looks_without_seeds(items, family, [1, 2, 3]) == [told + "the look at 3 seeds is not reached"]
    assert looks_without_seeds(items, family, [1, 2]) == []  # no look yet
    assert looks_without_seeds(items, {"declared": pairs}, [1, 2, 3]) == []
    assert looks_without_seeds(items | {"lora": items["content"]}, family, [1, 2, 3, 4, 5]) == []


def test_gatekeeping_by_hand():
    # The primary one, then Holm within the level: max(.03, .01·2), max(.03, max(.02, .04·1)).
    assert gatekeeping([0.01, 0.03, 0.04], [2, 1, 2]) == pytest.approx([0.03, 0.03, 0.04])
    assert gatekeeping([0.2, 1e-9, 1e-9], [1, 2, 3]) == pytest.approx([0.2, 0.2, 0.2])  # the gate is shut
    p_values = np.random.default_rng(0).random(7)
    assert gatekeeping(p_values, [1] * 7) == holm(p_values)
    assert gatekeeping([], []) == []


@pytest.mark.parametrize("true", [(), (0,), (0, 1), (1, 2, 3, 4)])
def test_family_error_with_gate_and_looks_is_at_most_five_percent(true):
    """Five comparisons that share an arm, t tests over 3, 5 and 8 seeds; `true` differences are large."""
    generator, looks = np.random.default_rng(len(true)), [3, 5, 8]
    runs = 4000
    own = generator.standard_normal((runs, 5, looks[-1])) + generator.standard_normal((runs, 1, looks[-1]))
    own[:, list(true)] += 20.0
    p_values = [stats.ttest_1samp(own[:, :, :look], 0.0, axis=2).pvalue for look in looks]
    p = two_sided(p_values, fractions_of(looks))
    adjusted = np.array([gatekeeping(row, [1, 2, 2, 2, 2]) for row in p])
    false = [place for place in range(5) if place not in true]
    error = (adjusted[:, false] <= 0.05).any(axis=1).mean()
    assert error <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    if true == (0,):
        assert error > 0.015  # the gate is open: it is Holm's procedure that holds the error
    if true == (1, 2, 3, 4):
        assert error > 0.03  # what the looks spend is all but the level
        naive = np.min(p_values, axis=0)[:, 0] <= 0.05
        assert naive.mean() > 0.08  # without the looks' correction


def test_planned_stops_by_the_test_that_is_made():
    """With many units and no unit part: a t test over the seeds at the nominal level of each look."""
    design = Design(units=10**6, unit_deviation=1e-9, seed_deviation=1.0)
    looks, runs = [3, 6], 20_000
    stops = planned_stops(design, 1.2, looks, experiments=runs)
    own = 1.2 + np.random.default_rng(5).standard_normal((runs, looks[-1]))
    first, last = (
        stats.ttest_1samp(own[:, :look], 0.0, axis=1).pvalue <= stop["level"]
        for look, stop in zip(looks, stops, strict=True)
    )
    assert stops[0]["stops"] == pytest.approx(first.mean(), abs=0.01)
    assert stops[1]["stops"] == pytest.approx((last & ~first).mean(), abs=0.015)
    assert sum(stop["stops"] for stop in planned_stops(design, 0.0, looks)) <= 0.055


def test_power_plans_the_looks():
    asked = ("power", "--documents", 60, "--seeds", 8, "--seed-sd", 0.003, "--difference", 0.01)
    (row,) = json.loads(invoke_app(*asked, "--looks", "3,5,8", "--json"))["designs"]
    assert [look["seeds"] for look in row["looks"]] == [3, 5, 8]
    assert [look["level"] for look in row["looks"]] == pytest.approx([5.04e-4, 8.99e-3, 4.71e-2], rel=1e-2)
    assert sum(look["by_chance"] for look in row["looks"]) < 0.056
    shown = invoke_app(*asked, "--looks", "3,5,8")
    assert "decided here" in shown
    few = json.loads(invoke_app(*asked, "--looks", "3,5,8", "--freedom", "6", "--json"))["designs"][0]
    assert few["unit_freedom"] == 6
    assert few["looks"][-1]["level"] == row["looks"][-1]["level"]
    assert sum(look["stops"] for look in few["looks"]) < sum(look["stops"] for look in row["looks"])
    (row,) = json.loads(invoke_app(*asked, "--looks", "3,5", "--json"))["designs"]
    assert [look["seeds"] for look in row["looks"]] == [3, 5]
    assert "0.047" in shown


@pytest.mark.parametrize(("units", "difference"), [(8, 0.0), (24, 0.7)])
def test_planned_stops_of_few_units_are_those_of_the_distribution(units, difference):
    """Units whose own variance is about as uncertain as that of the seeds, simulated with what judges a run."""
    design = Design.assumed(units=units, deviation=1.0, seed_deviation=0.3)
    looks, runs = [3, 5], 1500
    stops = planned_stops(design, difference, looks)
    generator, stopped = np.random.default_rng(3), np.zeros(2)
    for _ in range(runs):
        drawn = design.unit_deviation * generator.standard_normal(units)
        drawn = drawn + design.seed_deviation * generator.standard_normal((5, 1))
        drawn = drawn + design.residual_deviation * generator.standard_normal((5, units)) + difference
        for place, (look, stop) in enumerate(zip(looks, stops, strict=True)):
            distribution = RatioDistribution(drawn[:look], np.ones((look, units)), resamples=300)
            if distribution.interval(1 - stop["level"]).excludes_zero:
                stopped[place] += 1
                break
    planned = sum(stop["stops"] for stop in stops)
    error = np.sqrt(planned * (1 - planned) / runs)
    assert stopped.sum() / runs == pytest.approx(planned, abs=3 * error)
