"""What stands beside a difference, in words, in the plot and in the tables."""

from __future__ import annotations

from typing import Any

import pytest

from preskip.metrics import metric_named
from preskip.report.plots.forest import forest, forest_records
from preskip.report.words.detail import detail_texts, gain_share
from preskip.stats.verdicts import flipped

SETS: dict[str, Any] = {"home": {"domain": "in", "kind": "document"}, "far": {"domain": "out", "kind": "document"}}


def entry(name: str, arm: str, reference: str, difference: float, **more: Any) -> Any:
    return {
        "set": name,
        "metric": "bits_per_byte",
        "arm": arm,
        "reference": reference,
        "difference": difference,
        "low": difference - 0.02,
        "high": difference + 0.02,
        "margin": 0.005,
        "seeds": 3,
        "units": 60,
        "clusters": None,
        "verdict": "better",
        "declared": True,
        "p_value": 0.01,
        "p_holm": 0.02,
        "deviations": {"seed": 0.03, "unit": 0.2, "residual": 0.0},
        "detail": {
            "by_seed": [-0.04, -0.06, 0.01],
            "new_seed": (-0.2, 0.14),
            "probability_higher": 2 / 9,
            "p_sign_flip": 0.0312,
            "unit_freedom": 40.0,
        },
        **more,
    }


def test_texts_of_a_difference_and_of_the_same_turned_round() -> None:
    found = entry("home", "a", "none", -0.03)
    # 0.03² / 3 of seeds, 0.2² / 60 of units.
    assert detail_texts(found) == {
        "by_seed": "−0.040 −0.060 +0.010",
        "next_seed": "[−0.200, +0.140]",
        "wins": "0.78",
        "variance": "31 / 69 / 0",
        "sign_flip": "0.031",
    }
    # Of one book alone the parts are over its 40 pieces: 0.2² / 40.
    assert detail_texts({**found, "units": 40, "clusters": 1})["variance"] == "23 / 77 / 0"
    turned = detail_texts(flipped(found))
    assert (turned["by_seed"], turned["wins"]) == ("+0.040 +0.060 −0.010", "0.22")
    assert turned["next_seed"] == "[−0.140, +0.200]"
    one = detail_texts({**found, "seeds": 1})
    assert (one["wins"], one["variance"]) == ("–", "–")
    assert set(detail_texts({k: v for k, v in found.items() if k != "detail"}).values()) == {"–"}  # type: ignore[arg-type]


def test_the_margin_as_a_share_of_the_in_domain_gain() -> None:
    entries = [entry("home", "a", "none", -0.1), entry("far", "a", "b", 0.01), entry("home", "none", "b", 0.02)]
    assert gain_share(entries[0], entries, SETS) == (pytest.approx(0.05), "a")
    assert gain_share(entries[1], entries, SETS) == (pytest.approx(0.05), "a")
    # Stored the other way round: b gains 0.02 over none.
    assert gain_share(entry("far", "b", "a", 0.0), entries, SETS) == (pytest.approx(0.25), "b")
    assert gain_share(entry("far", "c", "a", 0.0), entries, SETS) is None
    assert gain_share(entry("home", "a", "none", -0.1, margin=None), entries, SETS) is None
    assert gain_share(entries[1], [entry("home", "a", "none", 0.1)], SETS) is None  # no gain, no share


def test_each_seed_is_a_tick_in_the_forest() -> None:
    records = forest_records([entry("home", "a", "none", -0.03)], metric_named("bits_per_byte"), "none")
    assert records[0]["seeds"] == [-0.04, -0.06, 0.01]
    marks = [layer["mark"]["type"] for layer in forest(records, metric_named("bits_per_byte"))["layer"]]
    assert "tick" in marks
    alone = forest_records([entry("home", "a", "none", -0.03, seeds=1)], metric_named("bits_per_byte"), "none")
    marks = [layer["mark"]["type"] for layer in forest(alone, metric_named("bits_per_byte"))["layer"]]
    assert "tick" not in marks
