"""The interval of a ratio of sums against SciPy, closed forms and invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from preskip.errors import PreskipError
from preskip.stats import RatioDistribution, bootstrap_ratio, paired_ratio_difference
from preskip.stats.bootstrap import of_unequal_sizes
from preskip.stats.discordant import NothingDiffers


def test_large_sample_interval_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=2000)
    interval = bootstrap_ratio(values, np.ones_like(values), resamples=20_000)
    half = 1.959964 * values.std(ddof=1) / math.sqrt(len(values))
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_ratio_interval_agrees_with_scipy_bca() -> None:
    generator = np.random.default_rng(2)
    size = generator.integers(500, 3000, 150).astype(float)
    nll = size * generator.gamma(20, 0.03, 150)
    ours = bootstrap_ratio(nll, size, resamples=20_000)
    theirs = scipy_stats.bootstrap(
        (nll, size),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        method="BCa",
        n_resamples=20_000,
        random_state=np.random.default_rng(3),
    ).confidence_interval
    width = theirs.high - theirs.low
    # Ours is wider by Student's t over the normal and by n/(n-1): about 1.2 % at 150 units.
    assert ours.low == pytest.approx(theirs.low, abs=0.04 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.04 * width)


def test_few_kinds_of_unit_are_drawn_as_counts_with_the_same_result() -> None:
    # 400 right/wrong differences are three kinds of unit; an invisible spread makes each its own kind.
    values = np.repeat([1.0, -1.0, 0.0], [40, 20, 340])
    split = values + 1e-9 * np.arange(400)
    few, many = (bootstrap_ratio(x, np.ones(400), resamples=40_000) for x in (values, split))
    assert few.low == pytest.approx(many.low, abs=0.003)
    assert few.high == pytest.approx(many.high, abs=0.003)


def test_small_sample_interval_has_the_width_of_students_t() -> None:
    values = np.array([-1.7, -1.1, -0.6, -0.2, 0.2, 0.6, 1.1, 1.7])
    interval = bootstrap_ratio(values, np.ones(8), resamples=50_000)
    half = scipy_stats.t.ppf(0.975, 7) * values.std(ddof=1) / math.sqrt(8)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.08)


def test_p_value_agrees_with_the_paired_t_test() -> None:
    generator = np.random.default_rng(4)
    for shift in (0.0, 0.08, 0.15, 0.25):
        a = generator.normal(shift, 1.0, 300)
        b = generator.normal(0.0, 1.0, 300)
        ours = RatioDistribution(a - b, np.ones(300), resamples=40_000).p_value()
        assert ours == pytest.approx(scipy_stats.ttest_rel(a, b).pvalue, rel=0.15, abs=1e-4)


def test_p_value_far_beyond_the_resamples_keeps_falling() -> None:
    half = np.random.default_rng(5).normal(0.0, 1.0, 20)
    values = np.concatenate([half, -half])
    p_values = [RatioDistribution(values + k, np.ones(40), resamples=20_000).p_value() for k in (0.5, 1, 2, 4)]
    expected = [scipy_stats.ttest_1samp(values + k, 0).pvalue for k in (0.5, 1, 2, 4)]
    # No floor at 1/resamples, which Holm's factor would lift above alpha; the tail is t's, so its logarithm is right.
    assert np.log(p_values) == pytest.approx(np.log(expected), rel=0.1)


@pytest.mark.parametrize("seeds", [1, 3])
def test_interval_excludes_a_point_exactly_when_p_is_small(seeds: int) -> None:
    for number in range(60):
        generator = np.random.default_rng(number)
        values = generator.gamma(2, 1, (seeds, 15)) - 2 + 0.8 * generator.standard_normal((seeds, 1))
        distribution = RatioDistribution(values, np.ones(15), resamples=300)
        for confidence in (0.8, 0.95):
            p_value = distribution.p_value()
            assert distribution.interval(confidence).excludes_zero == (p_value < 1 - confidence), (number, p_value)
        inner = distribution.interval(0.90)
        for margin in (0.3, 0.8, 1.5):
            inside = -margin < inner.low and inner.high < margin
            assert inside == (distribution.p_equivalence(margin) < 0.05)


def test_several_seeds_alone_give_the_t_interval_over_seeds() -> None:
    # No unit differs from another, so three seeds are three numbers.
    values = np.array([[1.0], [2.0], [4.0]]) * np.ones(50)
    interval = bootstrap_ratio(values, np.ones(50))
    half = scipy_stats.t.ppf(0.975, 2) * np.std([1, 2, 4], ddof=1) / math.sqrt(3)
    assert (interval.low, interval.high) == (pytest.approx(7 / 3 - half), pytest.approx(7 / 3 + half))


def test_variance_components_are_those_of_the_analysis_of_variance() -> None:
    statsmodels = pytest.importorskip("statsmodels.formula.api")
    from statsmodels.stats.anova import anova_lm

    generator = np.random.default_rng(6)
    values = generator.standard_normal((3, 1)) + 2 * generator.standard_normal(40) + generator.standard_normal((3, 40))
    seed, unit = np.indices(values.shape).reshape(2, -1)
    table = {"y": values.ravel(), "seed": seed, "unit": unit}
    squares = anova_lm(statsmodels.ols("y ~ C(seed) + C(unit)", data=table).fit())["mean_sq"]
    ours = RatioDistribution(values, np.ones(40), resamples=100).components
    assert ours["residual"] == pytest.approx(math.sqrt(squares["Residual"]))
    assert ours["seed"] == pytest.approx(math.sqrt((squares["C(seed)"] - squares["Residual"]) / 40))
    assert ours["unit"] == pytest.approx(math.sqrt((squares["C(unit)"] - squares["Residual"]) / 3))


def test_shared_documents_are_not_new_evidence_per_seed() -> None:
    generator = np.random.default_rng(5)
    size = np.full(20, 1000.0)
    difference = 0.03 * size * generator.standard_normal(20)
    one = paired_ratio_difference(difference, np.zeros(20), size)
    four = paired_ratio_difference(np.tile(difference, (4, 1)), np.zeros(20), size)
    assert (four.value, four.low, four.high) == (
        pytest.approx(one.value),
        pytest.approx(one.low),
        pytest.approx(one.high),
    )


@pytest.mark.parametrize(("gained", "lost"), [(6, 0), (12, 18)])
def test_seeds_that_gain_and_lose_different_items_in_equal_numbers_are_not_exact(gained: int, lost: int) -> None:
    # No seed differs from the other; items do (each in one seed), or not at all (what one seed gains the other loses).
    values = np.zeros((2, 60))
    values[0, :6], values[0, 6:12] = 1, -1
    values[1, gained : gained + 6], values[1, lost : lost + 6] = 1, -1
    found = RatioDistribution(values, np.ones(60))
    residual = values - values.mean(0)
    half = scipy_stats.t.ppf(0.975, 59) * math.sqrt((residual**2).sum() / 59 / 120) / 2
    assert half > 0.04
    assert (found.interval().low, found.interval().high) == (pytest.approx(-half), pytest.approx(half))
    assert found.p_equivalence(0.01) > 0.3


def test_answers_of_which_each_seed_gains_and_loses_its_own_are_covered() -> None:
    held = 0
    for number in range(400):
        draws = np.random.default_rng(number).choice([1.0, -1.0, 0.0], size=(3, 300), p=[0.03, 0.03, 0.94])
        held += not bootstrap_ratio(draws, np.ones(300), resamples=200).excludes_zero
    assert 375 <= held <= 396


def test_without_spread_the_value_is_exact() -> None:
    same = RatioDistribution(np.full(9, 0.25), np.ones(9))
    # No spread to judge by: the p of a sign test on which all nine agree, never 0.
    sign = scipy_stats.binomtest(9, 9).pvalue
    assert (same.interval().low, same.interval().high, same.p_value()) == (0.25, 0.25, pytest.approx(sign))
    assert same.p_equivalence(0.3) == pytest.approx(sign / 2)
    assert same.p_equivalence(0.25) >= 0.5
    assert same.p_equivalence(0.2) == pytest.approx(1 - sign / 2)
    zero = RatioDistribution(np.zeros((3, 9)), np.ones(9))
    assert (zero.interval().low, zero.interval().high, zero.p_value()) == (0, 0, 1)
    assert zero.p_equivalence(1e-6) == pytest.approx(sign / 2)
    # Rounding differs by batch, say; that is no difference.
    assert RatioDistribution(np.full(9, 1e-15), np.ones(9)).p_value() == 1.0


@pytest.mark.parametrize("sizes", [[5, 13, 5, 17, 9, 3], [1, 1, 1, 1, 1, 1, 1], list(range(1, 26)), [1, 2, 3, 4, 90]])
def test_degrees_of_freedom_are_bell_and_mccaffreys_from_the_matrix_written_out(sizes: list[int]) -> None:
    # Influences = s_g (r_g - Σ s r) of units whose own ratios r_g have variance 1: covariance A A', A = diag(s) (I -
    # 1 s'); Satterthwaite's degrees of freedom of e'e, and its expectation against the variance Σ s² of the ratio.
    shares = np.array(sizes) / np.sum(sizes)
    a = np.diag(shares) @ (np.eye(len(shares)) - np.outer(np.ones(len(shares)), shares))
    covariance = a @ a.T
    freedom, factor = of_unequal_sizes(shares)
    expected = np.trace(covariance) ** 2 / np.trace(covariance @ covariance)
    assert freedom == pytest.approx(max(1.0, expected), rel=1e-9)
    unbiased = (shares**2).sum() / np.trace(covariance)
    assert factor * len(sizes) / (len(sizes) - 1) == pytest.approx(max(unbiased, len(sizes) / (len(sizes) - 1)))


def test_few_unequal_clusters_have_the_cluster_robust_interval() -> None:
    sizes = np.array([5.0, 13, 5, 17, 9, 3])
    ratios = np.array([0.2, 0.1, -0.1, 0.3, 0.25, 0.0])
    interval = bootstrap_ratio(sizes * ratios, sizes)
    shares = sizes / sizes.sum()
    value = shares @ ratios
    e = shares * (ratios - value)
    a = np.diag(shares) @ (np.eye(6) - np.outer(np.ones(6), shares))
    m = a @ a.T
    error = np.sqrt(e @ e * (shares**2).sum() / np.trace(m))
    half = scipy_stats.t.ppf(0.975, np.trace(m) ** 2 / np.trace(m @ m)) * error
    assert (interval.low, interval.high) == (pytest.approx(value - half), pytest.approx(value + half))
    # CR2 as Pustejovsky and Tipton (2018) write it, from the pieces: A_g = (I - H_gg)^(-1/2), identity working model.
    owner = np.repeat(np.arange(6), sizes.astype(int))
    x, y = np.ones((len(owner), 1)), ratios[owner]
    residual, meat = y - y.mean(), 0.0
    for g in range(6):
        own = owner == g
        values, vectors = np.linalg.eigh(np.eye(own.sum()) - x[own] @ x[own].T / len(owner))
        adjusted = vectors @ np.diag(values**-0.5) @ vectors.T @ residual[own]
        meat += float(adjusted.sum()) ** 2
    assert error == pytest.approx(np.sqrt(meat) / len(owner), rel=0.05)


def test_few_equal_units_are_never_narrower_than_students_t() -> None:
    values = np.random.default_rng(0).standard_normal(8)
    interval = bootstrap_ratio(values, np.ones(8))
    low, high = scipy_stats.t.interval(0.95, 7, values.mean(), scipy_stats.sem(values))
    assert interval.low <= low + 1e-12
    assert interval.high >= high - 1e-12


def test_no_discordant_item_has_the_exact_binomial_limits() -> None:
    nothing = NothingDiffers(units=200, seeds=1)
    assert nothing.interval().high == pytest.approx(scipy_stats.beta.ppf(0.975, 1, 200))
    assert nothing.interval().low == -nothing.interval().high
    assert nothing.p_value() == 1.0
    # The chance to see none of 200 differ at a rate of 2 %.
    assert nothing.p_equivalence(0.02) == pytest.approx(0.98**200)


def test_order_of_units_and_seeds_does_not_matter() -> None:
    generator = np.random.default_rng(7)
    values, size = generator.random((3, 30)), np.arange(30) + 5.0
    order = np.random.default_rng(8).permutation(30)
    first, second = bootstrap_ratio(values, size), bootstrap_ratio(values[::-1, order], size[order])
    assert (first.low, first.high) == (pytest.approx(second.low), pytest.approx(second.high))


def test_the_seed_decides_the_resamples() -> None:
    values = np.random.default_rng(9).random(30)
    first, second, other = (bootstrap_ratio(values, np.ones(30), seed=seed) for seed in (4, 4, 5))
    assert first == second
    assert first.low != other.low


def test_bad_input_is_refused_with_one_line() -> None:
    ones = np.ones(5)
    cases = [
        (lambda: bootstrap_ratio([1, float("nan"), 2], ones[:3]), "1 NaN, infinite or impossible"),
        (lambda: bootstrap_ratio([1, 1e160, 1], np.ones(3)), "1 NaN, infinite or impossible"),
        (lambda: bootstrap_ratio(ones, ones[:4]), "one value per unit"),
        (lambda: bootstrap_ratio(ones[:1], ones[:1]), "too few for an interval"),
        (lambda: bootstrap_ratio(ones, np.zeros(5)), "positive size"),
        (lambda: bootstrap_ratio([], []), "not empty"),
        (lambda: bootstrap_ratio([[1, 2], [3]], [1, 1]), "not a table"),
        (lambda: bootstrap_ratio(ones, ones, confidence=95), "between 0 and 1"),
        (lambda: bootstrap_ratio(ones, ones, resamples=9), "too few for an interval: use 100"),
        (lambda: RatioDistribution(ones, ones).p_equivalence(0), "margin 0 must be positive"),
        (lambda: paired_ratio_difference(ones, ones[:4], ones), "same units"),
    ]
    for call, message in cases:
        with pytest.raises(PreskipError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
