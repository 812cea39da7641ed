"""Random effects over experiments, against statsmodels' figures, a simulation, and what must hold at the borders."""

import numpy as np
import pytest

from preskip.errors import PreskipError
from preskip.stats.combined import combine


def test_the_figures_are_those_of_statsmodels():
    # combine_effects(values, errors**2, method_re="iterated", use_t=True) of statsmodels 0.14, "random effect wls"
    found = combine([-0.004, 0.002, -0.007, -0.001], [0.002, 0.003, 0.0025, 0.001])
    assert found.between**2 == pytest.approx(8.235825696060871e-06, rel=1e-6)
    assert (found.value, found.standard_error) == pytest.approx((-0.002531, 0.001776), abs=5e-7)
    assert (found.low, found.high) == pytest.approx((-0.008183, 0.003121), abs=5e-7)
    assert found.p_value == pytest.approx(0.2493, abs=1e-4)  # 2 * t.sf(0.002531 / 0.001776, 3)


def test_experiments_that_agree_do_not_narrow_the_interval_of_a_common_truth():
    found = combine([0.01, 0.012, 0.011], [0.004, 0.003, 0.005])
    assert found.between == 0
    assert (found.value, found.low, found.high) == pytest.approx((0.011228, 0.001918, 0.020537), abs=5e-7)
    # t of one degree of freedom: 12.706 times the standard error
    assert found.predicted_high - found.value == pytest.approx(12.7062 * found.standard_error, rel=1e-4)


@pytest.mark.parametrize("between", [0.0, 2.0])
def test_its_interval_holds_the_mean_truth_as_often_as_it_says(between):
    generator = np.random.default_rng(3)
    errors = np.array([0.5, 1.0, 1.0, 2.0])
    held = 0
    for _ in range(1000):
        truths = 0.3 + between * generator.standard_normal(4)
        found = combine(truths + errors * generator.standard_normal(4), errors)
        held += found.low <= 0.3 <= found.high
    assert 930 <= held <= 1000  # never less than 95 % but for chance; more where all share one truth


def test_equivalence_agrees_with_the_interval():
    found = combine([0.001, 0.002, 0.0], [0.001, 0.001, 0.001], confidence=0.9)
    for margin in (0.002, 0.0027, 0.004):
        inside = -margin < found.low and found.high < margin
        assert (found.p_equivalence(margin) < 0.05) == inside


def test_what_cannot_be_combined_is_said():
    with pytest.raises(PreskipError, match="two runs or more"):
        combine([1.0], [1.0])
    for error in (0.0, float("nan")):
        with pytest.raises(PreskipError, match="positive standard error"):
            combine([1.0, 2.0], [1.0, error])
    two = combine([1.0, 2.0], [1.0, 1.0])
    assert two.predicted_low is None


@pytest.mark.parametrize(("of_models", "expected"), [(0.0, 0.68), (1.0, 0.79)])
def test_two_models_on_two_corpora_are_not_four_draws(of_models, expected):
    """What docs/statistics.md says that the interval then holds; the truth differs by corpus by 1."""
    generator, held = np.random.default_rng(0), []
    for _ in range(1500):
        truths = of_models * generator.standard_normal((2, 1)) + generator.standard_normal((1, 2))
        found = combine(truths.ravel(), [1e-3] * 4)
        held.append(found.low <= 0 <= found.high)
    assert np.mean(held) == pytest.approx(expected, abs=0.04)
