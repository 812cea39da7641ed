"""What stands beside a difference: seeds, prediction, probability of improvement, the randomisation p, variance."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from preskip.stats import compare
from preskip.stats.detail import detail_of, new_seed, sign_flip, variance_shares
from stored_runs import make_items


def test_detail_of_a_comparison_from_its_items() -> None:
    cells = {seed: make_items(seed, shift=-0.01 * seed) for seed in (1, 2, 3)}
    others = {seed: make_items(seed + 10, shift=-0.02) for seed in (1, 2, 3)}
    entry = compare(cells, others, arm="a", reference="b", sets=["heldout"])[0]

    def bits(items) -> float:
        documents = [item for item in items if item["kind"] == "document"]
        return sum(item["nll"] for item in documents) / sum(item["bytes"] for item in documents) / np.log(2)

    a, b = ([bits(items) for items in arm.values()] for arm in (cells, others))
    detail = entry["detail"]
    assert detail["by_seed"] == pytest.approx(np.subtract(a, b))
    assert np.mean(detail["by_seed"]) == pytest.approx(entry["difference"])
    wins = stats.mannwhitneyu(a, b).statistic / 9  # Agarwal et al. (2021): the probability of improvement
    assert detail["probability_higher"] == pytest.approx(wins)
    assert 0 < wins < 1
    assert detail["new_seed"] == pytest.approx(new_seed(np.array(detail["by_seed"])))
    assert entry["clusters"] is None
    assert 6 < detail["unit_freedom"] < 11
    one = compare(cells[1], others[1], arm="a", reference="b", sets=["heldout"])[0]
    assert one["detail"]["new_seed"] is None
    assert len(one["detail"]["by_seed"]) == 1


def test_a_new_seed_lies_in_its_prediction_interval_as_often_as_it_says() -> None:
    values = np.random.default_rng(0).standard_normal((4_000, 4))
    inside = [low <= later <= high for *seeds, later in values for low, high in [new_seed(np.array(seeds))]]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_seeds_that_agree_by_chance_leave_room_for_the_next(seeds: int) -> None:
    generator, sizes, inside = np.random.default_rng(seeds), np.ones(100), []
    for _ in range(3_000):
        a, b = (generator.random((2, seeds + 1, 100)) < 0.3).astype(float)
        low, high = detail_of(a[:-1], b[:-1], sizes)["new_seed"]
        assert high - low > 0.03
        inside.append(low <= (a[-1] - b[-1]).mean() <= high)
    assert 0.945 <= np.mean(inside) <= 0.98
    # Answers that all seeds share leave nothing that the next could differ by.
    same = np.repeat((generator.random((1, 100)) < 0.3).astype(float), seeds, axis=0)
    assert detail_of(same, same[::-1] * 0, sizes)["new_seed"] == pytest.approx([same.mean()] * 2)


def test_sign_flip_against_all_patterns_and_scipy() -> None:
    totals = np.array([0.5, 0.2, -0.1, 0.4, 0.9, 0.3, -0.2])
    sums = [abs(np.dot(signs, totals)) for signs in product((-1, 1), repeat=7)]
    assert sign_flip(totals) == pytest.approx(np.mean(np.array(sums) >= abs(totals.sum()) - 1e-9))
    # Six that agree reach 2 / 2^6, five no more than 0.0625: fewer are not judged.
    assert sign_flip(np.arange(1.0, 7)) == 2 / 2**6
    assert sign_flip(np.arange(1.0, 6)) > 0.05
    many = np.random.default_rng(1).normal(0.4, 1, 30)
    found = stats.permutation_test((many,), np.mean, permutation_type="samples", n_resamples=9_999, rng=2)
    assert sign_flip(many) == pytest.approx(found.pvalue, abs=0.01)
    assert sign_flip(np.full(30, 1.0)) == 1 / 10_000


def test_shares_of_variance_sum_to_the_whole() -> None:
    shares = variance_shares({"seed": 0.2, "unit": 3.0, "residual": 1.0}, 4, 100)
    assert shares == pytest.approx({"seeds": 0.01 / 0.1025, "units": 0.09 / 0.1025, "both": 0.0025 / 0.1025})
    assert variance_shares({"seed": None, "unit": 3.0, "residual": None}, 1, 100) is None


def test_one_cluster_or_few_are_not_judged() -> None:
    def pieces(shift: float, books: int) -> list[dict]:
        own = np.random.default_rng(round(abs(shift)))
        return [
            {"set": "books", "kind": "document", "id": f"{d:02}", "cluster": f"book {d % books}", "bytes": 1_000}
            | {"words": 200, "tokens": 250, "nll": 700 + shift + own.random()}
            for d in range(24)
        ]

    from preskip.stats import apply_family, measured_power

    for books, verdict in ((1, "too few units"), (5, "too few units"), (6, "better")):
        entry = apply_family(compare(pieces(-20, books), pieces(0, books), arm="a", reference="b"), {})[0]
        assert entry["verdict"] == verdict
        assert entry["clusters"] == books
        assert entry["high"] < 0 < entry["p_value"]
        assert (measured_power([entry], {})[0]["decides_none"] == 0) == (books < 6)
    alone = compare(pieces(-20, 1), pieces(0, 1), arm="a", reference="b")[0]
    assert alone["covers"] == "documents of one cluster only"
