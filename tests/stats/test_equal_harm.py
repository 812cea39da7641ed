"""What arms change in-domain at one harm: against numbers worked out by hand, and SciPy's paired t."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from preskip.stats.equal_harm import change_at, changes_at, last_rung, mean_difference

ROOT = Path(__file__).parents[2]


def trial(rate: float, inside: float, *outside: float, steps: int = 24, seed: int | None = 1) -> Any:
    limits = [{"value": value, "low": value - 0.01, "high": value + 0.01} for value in outside]
    dev = {"in": {"value": inside}, "out": dict(zip("ab", limits, strict=False))}
    own = {} if seed is None else {"for_seed": seed}
    return {"rung": 1, "steps": steps, "learning_rate": rate, "seed": 7, "dev": dev, **own}


def test_it_lies_between_the_two_rates_that_enclose_the_harm() -> None:
    trials = [trial(4e-3, -0.3, 0.05), trial(1e-3, -0.1, -0.02), trial(2e-3, -0.2, 0.01)]  # in any order
    assert change_at(trials, 0.03) == pytest.approx(-0.25)
    assert change_at(trials, 0.0) == pytest.approx(-0.2 + 0.1 / 3)
    assert change_at(trials, 0.01) == pytest.approx(-0.2)  # a rate that has just this harm
    assert change_at(trials, -0.03) is None  # every rate does more
    assert change_at(trials, 0.05) is None  # none does, and the highest is the best: a higher one might be better still


def test_a_better_rate_that_does_less_harm_counts() -> None:
    """As `content` on books: the harm passes the limit where the in-domain loss rises already."""
    trials = [trial(1e-3, -0.074, -0.011), trial(2e-3, -0.072, 0.005), trial(3e-3, -0.059, 0.043)]
    assert change_at(trials, 0.01) == -0.074
    assert change_at(trials, 0.05) == -0.074  # the best is known, as a higher rate is worse
    assert change_at(trials, -0.02) is None
    falling = [trial(1e-3, -0.1, 0.03), trial(2e-3, -0.2, 0.01)]
    assert change_at(falling, 0.02) is None  # the highest is the best
    assert change_at([*falling, trial(3e-3, -0.15, 0.01)], 0.02) == -0.2


def test_the_worst_text_is_the_harm_and_the_best_pair_counts() -> None:
    assert change_at([trial(1e-3, -0.1, -0.5, 0.0), trial(2e-3, -0.2, 0.02, 0.01)], 0.01) == pytest.approx(-0.15)
    down_and_up = [trial(1e-3, -0.1, 0.0), trial(2e-3, -0.2, 0.02), trial(3e-3, -0.3, 0.0), trial(4e-3, -0.4, 0.02)]
    assert change_at(down_and_up, 0.01) == pytest.approx(-0.35)


def test_nothing_is_interpolated_to_a_diverged_rate() -> None:
    diverged = {**trial(2e-3, 0.0, 0.0), "dev": None}
    assert change_at([trial(1e-3, -0.1, 0.0), diverged, trial(3e-3, -0.3, 0.1)], 0.01) == -0.1
    assert change_at([trial(1e-3, -0.1, 0.0), diverged], 0.01) == -0.1
    assert change_at([trial(1e-3, -0.1), trial(2e-3, -0.2)], 0.01) is None  # nothing scored out of domain


def test_of_a_search_the_last_rung_counts_by_seed() -> None:
    early = [trial(1e-3, -9.0, 0.0, steps=12), trial(2e-3, -9.0, 1.0, steps=12)]
    late = [trial(rate, -rate * 100 * seed, rate * 10, seed=seed) for seed in (1, 2) for rate in (1e-3, 2e-3)]
    assert changes_at({"trace": early + late}, 0.015) == pytest.approx({"1": -0.15, "2": -0.3})
    one = [trial(1e-3, -0.1, 0.0, seed=None), trial(2e-3, -0.2, 0.02, seed=None)]
    assert changes_at({"trace": one}, 0.01) == pytest.approx({"7": -0.15})


def test_the_difference_is_a_paired_t_over_common_seeds() -> None:
    own, other = {"1": -0.20, "2": -0.25, "3": None, "4": -0.23}, {"1": -0.21, "2": -0.22, "3": -0.2, "4": -0.24}
    found = mean_difference(own, other)
    assert found is not None
    expected = stats.ttest_rel([-0.20, -0.25, -0.23], [-0.21, -0.22, -0.24])
    limits = expected.confidence_interval(0.95)
    assert found == pytest.approx(
        {"value": -0.01 / 3, "low": limits.low, "high": limits.high, "p_value": expected.pvalue}
    )
    assert mean_difference({"1": -0.2}, other) is None
    assert mean_difference({"3": None, "1": -0.1}, other) is None


def test_a_stored_search() -> None:
    run = ROOT / "results" / "confirmatory-smollm2-wikitext2" / "results.json"
    search = json.loads(run.read_text())["search"]
    content, lora = (changes_at(search[arm], 0.01) for arm in ("content", "lora"))
    assert set(content) == set(lora)
    found = mean_difference(content, lora)
    assert found is not None
    assert found["low"] < found["value"] < found["high"]
    for seed, change in content.items():
        tried = [point["dev"]["in"]["value"] for point in search["content"]["trace"] if str(point["for_seed"]) == seed]
        assert min(tried) < change < max(tried)


def test_rungs_of_equally_many_steps_are_told_apart() -> None:
    """Of 4 steps or fewer both rungs of a search train 2."""
    early = [{**trial(rate, -9.0, 0.0), "rung": 0} for rate in (1e-3, 2e-3)]
    late = [trial(1e-3, -0.1, 0.0), trial(2e-3, -0.2, 0.02)]
    assert [row["rung"] for row in last_rung({"trace": early + late})["1"]] == [1, 1]
