"""Accuracies of which few items differ: limits against exact sums over all outcomes, and SciPy's binomial ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from preskip.stats import paired_accuracy_difference
from preskip.stats.discordant import FEW, FewDiffer


def distribution(items: int, gained: int, lost: int, seeds: int = 1):
    a, b = np.zeros((seeds, items)), np.zeros(items)
    a[:, :gained] = 1
    b[gained : gained + lost] = 1
    return paired_accuracy_difference(a, b, resamples=999).distribution


def test_one_item_gained_of_300_is_not_equivalent_within_a_point() -> None:
    one = distribution(300, 1, 0)
    assert isinstance(one, FewDiffer)
    assert one.value == pytest.approx(1 / 300)
    # All that differ go one way: Clopper and Pearson's limit of that rate.
    assert one.interval(0.90).high == pytest.approx(stats.binomtest(1, 300).proportion_ci(0.90, "exact").high)
    assert one.p_equivalence(0.01) > 0.15
    assert distribution(300, 0, 0).p_equivalence(0.01) == pytest.approx(0.99**300)
    # A second opinion of one that was lost narrows nothing.
    assert distribution(300, 1, 1).interval(0.90).high > 0.01
    # More items say more.
    assert distribution(1_500, 1, 0).p_equivalence(0.01) < 0.001


def test_limits_are_bonett_and_prices_where_both_ways_occur() -> None:
    items, gained, lost = 400, 5, 3
    value = (gained - lost) / (items + 2)
    spread = np.sqrt(((gained + lost + 2) / (items + 2) - value**2) / (items + 1))
    expected = value + stats.t.ppf(0.975, items + 1) * spread * np.array([-1, 1])
    found = distribution(items, gained, lost).interval()
    assert (found.low, found.high) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    assert found.value == (gained - lost) / items


@pytest.mark.parametrize("items", [300, 500])
def test_wrong_equivalence_and_coverage_over_all_outcomes(items: int) -> None:
    # The exact chance of every pair of counts, at a true difference on the margin of one point. Beyond the few that
    # differ nothing is equivalent at so many items.
    counts = {
        (gained, lost): distribution(items, gained, lost)
        for gained in range(FEW + 1)
        for lost in range(FEW + 1 - gained)
    }
    equivalent = [pair for pair, found in counts.items() if found.p_equivalence(0.01) <= 0.05]
    covering = {pair: found.interval() for pair, found in counts.items()}
    for lost_rate in (0.0, 0.001, 0.002, 0.005, 0.01):
        chance = stats.multinomial(items, [0.01 + lost_rate, lost_rate, 0.99 - 2 * lost_rate])

        def probability(pairs, chance=chance) -> float:
            return float(sum(chance.pmf([gained, lost, items - gained - lost]) for gained, lost in pairs))

        assert probability(equivalent) <= 0.06
        missed = [pair for pair, found in covering.items() if not found.low <= 0.01 <= found.high]
        assert probability(missed) <= 0.055


def test_several_seeds_and_clusters() -> None:
    # One item gained in one of three seeds: the seeds' part is in the interval, the exact limit is of the item's rate.
    a = np.zeros((3, 300))
    a[0, 0] = 1
    found = paired_accuracy_difference(a, np.zeros(300), resamples=999).distribution
    assert found.value == pytest.approx(1 / 900)
    assert found.interval(0.90).high >= stats.binomtest(1, 300).proportion_ci(0.90, "exact").high - 1e-12
    assert found.components["seed"] is not None
    # Items of 60 documents: the rate is of documents, of which there are fewer.
    clusters = np.repeat(np.arange(60), 5)
    clustered = paired_accuracy_difference(a[0], np.zeros(300), clusters, resamples=999).distribution
    assert clustered.interval(0.90).high == pytest.approx(
        stats.binomtest(1, 60).proportion_ci(0.90, "exact").high, rel=1e-9
    )
    assert clustered.units == 60


def test_turned_round_it_is_the_same() -> None:
    found, turned = distribution(200, 4, 1), distribution(200, 1, 4)
    assert found.interval().low == pytest.approx(-turned.interval().high)
    assert found.p_value() == pytest.approx(turned.p_value())
    assert found.p_equivalence(0.03) == pytest.approx(turned.p_equivalence(0.03))
