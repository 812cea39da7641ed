"""What the choice of a rate has of the spread over seeds: by hand, and against trainings whose law is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preskip.stats.rates import change_at_rate, rate_spreads

ROOT = Path(__file__).parents[2]


def trial(rate: float, inside: float, outside: float | None = 0.0, *, seed: int = 1, steps: int = 24) -> Any:
    out = {} if outside is None else {"books": {"value": outside}, "wiki": {"value": outside - 1}}
    return {
        "rung": 1,
        "learning_rate": rate,
        "steps": steps,
        "seed": 7,
        "for_seed": seed,
        "dev": {"in": {"value": inside}, "out": out},
    }


def test_a_change_is_read_off_between_two_rates() -> None:
    trials = [trial(4e-3, -0.3, 0.05), trial(1e-3, -0.1, -0.02)]  # in any order
    assert change_at_rate(trials, 2e-3, "in") == pytest.approx(-0.2)  # the middle of the logarithms
    assert change_at_rate(trials, 2e-3, "out") == pytest.approx(0.015)  # the worst set
    assert change_at_rate(trials, 1e-3, "in") == -0.1
    assert change_at_rate(trials, 4e-3, "in") == -0.3
    assert change_at_rate(trials, 0.9e-3, "in") is None
    assert change_at_rate(trials, 5e-3, "in") is None


def test_nothing_is_read_off_beside_a_diverged_rate() -> None:
    trials = [trial(1e-3, -0.1), {**trial(2e-3, 0.0), "dev": None}, trial(4e-3, -0.3), trial(8e-3, -0.4, None)]
    assert change_at_rate(trials, 1.5e-3, "in") is None
    assert change_at_rate(trials, 2e-3, "in") is None
    assert change_at_rate(trials, 6e-3, "in") == pytest.approx(-0.3 - 0.1 * math.log2(1.5))
    assert change_at_rate(trials, 6e-3, "out") is None


def searched(rates: dict[int, float], change: Any, tried: Any = (1e-3, 2e-3, 4e-3, 8e-3)) -> Any:
    """A search whose seed s reaches change(s, log2 of the rate over 1e-3), and twice that as harm."""
    trace = []
    for seed, chosen in rates.items():
        for rate in sorted({*tried, chosen}):
            reached = change(seed, math.log2(rate / 1e-3))
            trace += [trial(rate, reached, 2 * reached, seed=seed), trial(rate, 99.0, 99.0, seed=seed, steps=12)]
    return {"by_seed": {str(seed): rate for seed, rate in rates.items()}, "trace": trace}


def test_what_the_choice_has_is_gone_at_the_mean_rates() -> None:
    rates = {1: 1e-3, 2: 2e-3, 3: 4e-3}
    seeds = {1: 0.01, 2: -0.01, 3: 0.0}
    arm = searched(rates, lambda seed, place: seeds[seed] - 0.1 * place)  # all seeds gain 0.1 by a doubled rate
    still = searched(dict.fromkeys(rates, 2e-3), lambda seed, place: -0.2)
    found = rate_spreads(arm, still)
    own = [seeds[seed] - 0.1 * math.log2(rate / 1e-3) for seed, rate in rates.items()]
    assert found["in"] == pytest.approx({"seeds": 3, "own": np.std(own, ddof=1), "common": 0.01})
    assert found["out"] == pytest.approx({"seeds": 3, "own": 2 * np.std(own, ddof=1), "common": 0.02})
    # The same choice of both arms cancels where both gain the same by it.
    same = rate_spreads(arm, searched(rates, lambda seed, place: -0.1 * place))
    assert same["in"] == pytest.approx({"seeds": 3, "own": 0.01, "common": 0.01})


def test_a_seed_that_does_not_tell_is_left_out() -> None:
    rates = {1: 1e-3, 2: 2e-3, 3: 8e-3, 4: 2e-3}  # their mean is 2.4e-3
    arm = searched(rates, lambda seed, place: -0.1 * place)
    still = searched(dict.fromkeys(rates, 2e-3), lambda seed, place: -0.2)
    arm["trace"] = [row for row in arm["trace"] if row["for_seed"] != 3 or row["learning_rate"] > 5e-3]
    assert rate_spreads(arm, still)["in"]["seeds"] == 3
    arm["trace"] = [row for row in arm["trace"] if row["for_seed"] < 3]
    assert rate_spreads(arm, still) == {}
    assert rate_spreads({key: value for key, value in arm.items() if key != "by_seed"}, still) == {}


def test_a_stored_search() -> None:
    """Worked out with NumPy's own interpolation."""
    run = ROOT / "results" / "confirmatory-smollm2-wikitext2" / "results.json"
    search = json.loads(run.read_text())["search"]
    reached = {}
    for arm in ("preskip", "lora"):
        rates = search[arm]["by_seed"]
        mean = np.exp(np.mean(np.log(list(rates.values()))))
        for seed, rate in rates.items():
            rows = sorted(
                (row["learning_rate"], row["dev"]["in"]["value"])
                for row in search[arm]["trace"]
                if row["steps"] == 24 and str(row["for_seed"]) == seed
            )
            at, changes = np.array(rows).T
            reached[arm, seed] = np.interp(np.log([rate, mean]), np.log(at), changes)
    differences = np.array([reached["preskip", seed] - reached["lora", seed] for seed in search["lora"]["by_seed"]])
    own, common = differences.std(axis=0, ddof=1)
    assert rate_spreads(search["preskip"], search["lora"])["in"] == pytest.approx(
        {"seeds": 5, "own": own, "common": common}
    )
    assert own > 5 * common  # nearly all of the spread is that of the rates
