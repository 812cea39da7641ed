"""Paired accuracies from plain tables."""

from __future__ import annotations

import numpy as np
import pytest

from preskip.errors import PreskipError
from preskip.stats import mcnemar, paired_accuracy_difference


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    # 2·P(X ≤ min) of a fair coin by hand: (9, 4) is 2·(1+13+78+286+715)/2^13, (1, 4) is 2·(1+5)/2^5.
    [(9, 4, 2 * 1093 / 8192), (4, 9, 2 * 1093 / 8192), (10, 0, 2 / 1024), (3, 3, 1.0), (0, 0, 1.0), (1, 4, 0.375)],
)
def test_mcnemar_golden(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p, rel=1e-12)
    a = [1] * gained + [0] * lost + [1, 1, 0, 0]
    b = [0] * gained + [1] * lost + [1, 1, 0, 0]
    result = paired_accuracy_difference(a, b)
    assert (result.gained, result.lost, result.p_value) == (gained, lost, pytest.approx(p))
    assert result.distribution.value == pytest.approx((gained - lost) / len(a))


def test_mcnemar_agrees_with_statsmodels() -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    for gained, lost in ((9, 4), (30, 12), (0, 6), (101, 87)):
        table = [[50, gained], [lost, 40]]
        assert mcnemar(gained, lost) == pytest.approx(tables.mcnemar(table, exact=True).pvalue)


def test_items_of_one_document_are_resampled_together() -> None:
    # Copies of an item are no new evidence: ten documents of one item or of four alike give one interval.
    a, b = np.random.default_rng(1).integers(0, 2, (2, 40))
    copies = np.repeat(a, 4), np.repeat(b, 4), np.repeat(np.arange(40), 4)
    alone, fours = (paired_accuracy_difference(*given).distribution.interval() for given in ((a, b), copies))
    assert (fours.low, fours.high, fours.units) == (
        pytest.approx(alone.low, abs=0.01),
        pytest.approx(alone.high, abs=0.01),
        40,
    )


def test_bad_input_is_refused_with_one_line() -> None:
    cases = [
        (lambda: paired_accuracy_difference([1, 0, 2], [0, 1, 1]), "other than 0 and 1"),
        (lambda: paired_accuracy_difference([1, 0, 1], [0, 1, 1], ["a", "b"]), "2 cluster labels for 3"),
        (lambda: paired_accuracy_difference([1, 0, 1], [0, 1]), "same units"),
        (lambda: mcnemar(-1, 2), "must not be negative"),
    ]
    for call, message in cases:
        with pytest.raises(PreskipError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
