"""Holm's correction, equivalence and the verdict rule."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from preskip.errors import PreskipError
from preskip.stats import RatioDistribution, apply_family, compare, holm
from preskip.stats.verdicts import margin_of, verdict_of
from stored_runs import make_items


def entry(**changes: object) -> dict:
    base = {"set": "heldout", "metric": "bits_per_byte", "arm": "a", "reference": "none", "p_value": 0.01}
    base |= {"units": 60, "clusters": None}
    return {**base, "difference": -0.1, "low": -0.2, "high": -0.01, "margin": 0.005, "p_equivalence": 0.9, **changes}


def test_holm_golden_and_against_statsmodels() -> None:
    # By hand: sorted .01·3, max(.03, .03·2), max(.06, .04·1).
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p_values = np.random.default_rng(1).random(21) ** 3
    assert holm(p_values) == pytest.approx(multitest.multipletests(p_values, method="holm")[1])
    with pytest.raises(PreskipError, match="not between 0 and 1"):
        holm([0.5, float("nan")])


def test_equivalence_agrees_with_two_one_sided_t_tests() -> None:
    weightstats = pytest.importorskip("statsmodels.stats.weightstats")
    generator = np.random.default_rng(2)
    for shift in (0.0, 0.05, 0.1, 0.3):
        a, b = generator.normal(shift, 1.0, 400), generator.normal(0.0, 1.0, 400)
        for margin in (0.1, 0.2):
            ours = RatioDistribution(a - b, np.ones(400), resamples=40_000).p_equivalence(margin)
            theirs = weightstats.ttost_paired(a, b, -margin, margin)[0]
            assert ours == pytest.approx(theirs, rel=0.1, abs=0.002)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "better"),
        ({"metric": "acc"}, "worse"),
        ({"difference": 0.1, "low": 0.01, "high": 0.2}, "worse"),
        ({"difference": 0.1, "low": 0.01, "high": 0.2, "metric": "exact_match"}, "better"),
        # The test decides, at whatever level the interval is shown.
        ({"p_value": 0.07}, "undecided"),
        ({"low": -0.2, "high": 0.01}, "better"),
        # A declared comparison is held to the adjusted p, any other to its own.
        ({"declared": True, "p_holm": 0.07}, "undecided"),
        ({"declared": False, "p_holm": None}, "better"),
        ({"low": -0.004, "high": 0.003, "p_value": 0.8, "p_equivalence": 0.04}, "equivalent"),
        # Found, though too small to matter: the difference is the finding.
        ({"low": -0.004, "high": -0.001, "p_equivalence": 0.001}, "better"),
        ({"declared": True, "p_holm": 0.2, "p_equivalence": 0.001}, "equivalent"),
        ({"low": -0.004, "high": 0.003, "p_value": 0.8, "p_equivalence": None, "margin": None}, "undecided"),
    ],
)
def test_verdict_rule(changes: dict, expected: str) -> None:
    assert verdict_of(entry(**changes)) == expected


def test_family_counts_what_was_declared_even_if_not_measured() -> None:
    declared = [{"arm": arm, "reference": "none", "set": "heldout", "metric": "bits_per_byte"} for arm in "abc"]
    entries = [entry(arm="a", p_value=0.02), entry(arm="b", p_value=0.03), entry(arm="z", p_value=0.04)]
    first, second, other = apply_family(entries, {"declared": declared})
    # Three declared, one of them without result: .02·3 and max(.06, .03·2).
    assert (first["p_holm"], first["declared"], first["verdict"]) == (pytest.approx(0.06), True, "undecided")
    assert second["p_holm"] == pytest.approx(0.06)
    assert (other["p_holm"], other["declared"], other["verdict"]) == (None, False, "better")
    # A pair declared the other way round is the same comparison, and alpha is the family's.
    reverse = [{"arm": "none", "reference": "a", "set": "heldout", "metric": "bits_per_byte"}]
    (found,) = apply_family([entry()], {"declared": reverse, "alpha": 0.005})
    assert (found["declared"], found["p_holm"], found["verdict"]) == (True, 0.01, "undecided")


def test_a_comparison_of_too_few_units_opens_no_gate() -> None:
    declared = [
        {"arm": arm, "reference": "none", "set": "heldout", "metric": "bits_per_byte", "level": level}
        for arm, level in (("a", 1), ("b", 2))
    ]
    family = {"declared": declared, "procedure": "gatekeeping"}
    found = apply_family([entry(arm="a", p_value=1e-6, clusters=5), entry(arm="b", p_value=1e-6)], family)
    assert [(row["p_holm"], row["verdict"]) for row in found] == [(1.0, "too few units"), (1.0, "undecided")]


def test_a_gatekeeping_family_corrects_equivalences_too() -> None:
    declared = [
        {"arm": arm, "reference": "none", "set": "heldout", "metric": "bits_per_byte", "level": 1 + (arm != "a")}
        for arm in "abc"
    ]
    family = {"declared": declared, "procedure": "gatekeeping"}
    # Holm over the three equivalences: .02·3, max(.06, .02·2), 1; differences: the gate of .6 is shut.
    equal = {"low": -0.002, "high": 0.002, "p_value": 0.6, "p_equivalence": 0.02}
    found = apply_family([entry(arm="a", **equal), entry(arm="b", **equal), entry(arm="c", p_value=1e-6)], family)
    assert [row["p_equivalence_holm"] for row in found] == pytest.approx([0.06, 0.06, 0.9])
    assert [row["p_holm"] for row in found] == pytest.approx([0.6, 0.6 * 1, 0.6])
    assert [row["verdict"] for row in found] == ["undecided", "undecided", "undecided"]
    # As a family of one level without a procedure, as earlier runs have declared it.
    old = {"declared": [{key: value for key, value in row.items() if key != "level"} for row in declared]}
    found = apply_family([entry(arm="a", **equal), entry(arm="b", **equal), entry(arm="c", p_value=1e-6)], old)
    assert [row["verdict"] for row in found] == ["equivalent", "equivalent", "better"]
    # The primary one is decided, and opens the gate.
    found = apply_family([entry(arm="a"), entry(arm="b", p_value=0.02), entry(arm="c", p_value=0.04)], family)
    assert [row["p_holm"] for row in found] == pytest.approx([0.01, 0.04, 0.04])
    # What was not looked at yet is not known.
    (row, *_) = apply_family([entry(arm="a")], {**family, "looks": [3, 5]})
    assert (row["p_holm"], row["verdict"]) == (1.0, "undecided")


def test_family_refuses_other_margins_and_doubles() -> None:
    with pytest.raises(PreskipError, match=r"with margin 0\.005, the family states 0\.01"):
        apply_family([entry()], {"margins": {"bits_per_byte": 0.01}})
    with pytest.raises(PreskipError, match="occurs twice"):
        apply_family([entry(), entry(arm="none", reference="a")], {})


def test_margins_by_set_go_first() -> None:
    margins = {"acc": 0.01, "lambada.acc": 0.02}
    assert margin_of(margins, "lambada", "acc") == 0.02
    assert margin_of(margins, "arc", "acc") == 0.01
    assert margin_of(margins, "arc", "f1") is None
    a, b = make_items(1), make_items(2)
    found = compare(a, b, margins={"heldout.bits_per_byte": 0.5})
    assert [e["margin"] for e in found] == [0.5, None, None]
    assert found[0]["p_equivalence"] < 0.05
    verdicts = [e["verdict"] for e in apply_family(found, {"margins": {"heldout.bits_per_byte": 0.5}})]
    assert "equivalent" not in verdicts[1:]


def test_the_statistics_do_not_load_torch() -> None:
    code = "import sys, preskip.stats, preskip.stats.verdicts, preskip.stats.trends; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
