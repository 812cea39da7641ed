"""Comparisons in words."""

from __future__ import annotations

from typing import Any

import pytest

from preskip.report.words import verdicts

SETS = {"held": {"title": "Held out"}, "words": {"title": "Words"}}


def comparison(metric: str, verdict: str, difference: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    name = "held" if metric == "bits_per_byte" else "words"
    entry = {"set": name, "metric": metric, "arm": "a", "reference": "b", "verdict": verdict}
    entry |= {"seeds": 3, "units": 60, "unit": "document", "clusters": None}
    return {**entry, "difference": difference, "low": low, "high": high, **more}


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (
            comparison("bits_per_byte", "better", -0.052, -0.057, -0.047),
            "a lowers bits per byte on Held out by 0.0520 [0.0470, 0.0570] against b",
        ),
        (
            comparison("bits_per_byte", "worse", 0.2, 0.1, 0.3),
            "a raises bits per byte on Held out by 0.200 [0.100, 0.300] against b",
        ),
        (
            comparison("acc", "better", 0.05, 0.01, 0.09),
            "a raises accuracy on Words by 5.0 [1.0, 9.0] points against b",
        ),
        (
            comparison("bits_per_byte", "equivalent", 0.001, -0.001, 0.003, margin=0.005),
            "a and b are equivalent in bits per byte on Held out: the difference is +0.0010 [−0.0010, +0.0030], "
            "within ±0.0050",
        ),
        (
            comparison("acc", "undecided", 0.01, -0.02, 0.04, margin=0.01),
            "a and b cannot be told apart in accuracy on Words: the difference is +1.0 [−2.0, +4.0] points, an "
            "interval that includes 0 and reaches beyond ±1.0 points",
        ),
        (
            comparison("acc", "undecided", 0.075, 0.013, 0.149, p_value=0.0703, p_holm=None),
            "a and b cannot be told apart in accuracy on Words: the difference is +7.5 [+1.3, +14.9] points, but p "
            "is 0.07",
        ),
        (
            comparison("nll", "undecided", -0.2, -0.39, -0.01, p_value=0.04, p_holm=0.31),
            "a and b cannot be told apart in target loss on Words: the difference is −0.200 [−0.390, −0.010] nats, "
            "but p corrected for the family is 0.31",
        ),
        (
            comparison("bits_per_byte", "undecided", 0.0, -0.002, 0.002, margin=0.005, p_equivalence_holm=0.06),
            "a and b cannot be told apart in bits per byte on Held out: the difference is 0.0000 [−0.0020, +0.0020], "
            "an interval that includes 0, within ±0.0050, but p of equivalence corrected for the family is 0.06",
        ),
        (
            comparison("bits_per_byte", "better", -0.0015, -0.0059, 0.0029, looked={"p_value": 0.01}),
            "a lowers bits per byte on Held out by 0.0015 [−0.0029, 0.0059] against b, decided at an earlier look",
        ),
    ],
)
def test_sentences(entry: dict[str, Any], text: str) -> None:
    assert verdicts.sentence(entry, SETS) == text


@pytest.mark.parametrize(
    ("low", "high", "margin", "interval"),
    [
        (0.00042, 0.0312, None, "[+0.04, +3.12]"),
        (-0.0656, -0.00003, None, "[−6.560, −0.003]"),
        (-0.01013, 0.0875, 0.01, "[−1.01, +8.75]"),
        (-0.01, 0.0875, 0.01, "[−1.0, +8.8]"),
        (0.0, 0.0312, 0.01, "[0.0, +3.1]"),
        (-1e-9, 0.04, None, "[0.000000, +4.000000]"),
    ],
)
def test_no_limit_is_rounded_onto_0_or_the_margin(low: float, high: float, margin: float | None, interval: str) -> None:
    entry = comparison("acc", "undecided", (low + high) / 2, low, high, margin=margin)
    assert verdicts.difference_text(entry)["interval"] == interval
    assert interval in verdicts.sentence(entry, SETS)


def test_few_units_are_said_and_one_training_is_not_the_method() -> None:
    entry = comparison("bits_per_byte", "too few units", -0.05, -0.1, -0.01, clusters=4)
    assert verdicts.sentence(entry, {}) == (
        "a and b are not judged in bits per byte on held: the difference is −0.050 [−0.100, −0.010], but from 4 "
        "independent clusters, fewer than 6"
    )
    one = comparison("bits_per_byte", "better", -0.052, -0.057, -0.047, seeds=1, reference="none")
    assert verdicts.sentence(one, {}).startswith("this training of a lowers bits per byte on held by 0.0520")
    assert verdicts.sentence(one, {}).endswith("against none")


def test_sets_have_a_short_name_in_sentences() -> None:
    """A task is called as lm-eval calls it, a corpus without the part that is scored; anything else by its title."""
    sets = {
        "lambada_openai": {"title": "LAMBADA, test (lm-eval lambada_openai, version 1.0)", "lm_eval": {"version": 1.0}},
        "sotu": {"title": "sotu, held-out documents"},
        "last_word": {"title": "last word (SOTU)"},
    }
    names = [verdicts.set_label(sets, key) for key in (*sets, "other")]
    assert names == ["lambada_openai", "sotu", "last word (SOTU)", "other"]
    entry = comparison("acc", "better", 0.05, 0.01, 0.09) | {"set": "lambada_openai"}
    assert "raises accuracy on lambada_openai by 5.0" in verdicts.sentence(entry, sets)


def test_numbers() -> None:
    assert verdicts.number(-0.00001, 3) == "0.000"
    assert verdicts.number(-1234.5, 1, sign=True) == "−1,234.5"
    assert [verdicts.p_text(p) for p in (None, 0.00001, 0.0473)] == ["–", "< 0.0001", "0.047"]
    assert verdicts.amount("acc", 0.0123) == "1.2 points"
    assert verdicts.amount("bits_per_byte", -0.00512) == "0.0051"
    margins = [verdicts.margin_text("acc", 0.0125), *(verdicts.margin_text("bits_per_byte", m) for m in (0.005, 2e-7))]
    assert margins == ["±1.25 points", "±0.0050", "±0.000000"]


def test_unknown_metrics_keep_their_name() -> None:
    assert verdicts.metric_named("f1_score").name == "F1 score"
    assert not verdicts.metric_named("f1_score").lower_is_better


@pytest.mark.parametrize(
    ("seeds", "per_entry", "text"),
    [(1, [1], "One seed"), (3, [3, 3], "3 seeds: the intervals cover both"), (3, [3, 1], "Up to 3 seeds: only")],
)
def test_scope(seeds: int, per_entry: list[int], text: str) -> None:
    assert verdicts.scope([{"seeds": count} for count in per_entry], seeds).startswith(text)
