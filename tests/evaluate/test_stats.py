"""The paired statistics against SciPy, closed forms, simulated coverage and invariances."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy import stats as scipy_stats

from preskip.errors import PreskipError
from preskip.evaluate.stats import (
    bits_per_byte,
    bootstrap_ratio,
    compare,
    mcnemar,
    paired_accuracy_difference,
    paired_ratio_difference,
    summarise,
    word_perplexity,
)


def make_items(seed: int, documents: int = 12, shift: float = 0.0, rate: float = 0.4) -> list[dict]:
    # Difficulty belongs to the document, and is the same whatever the arm or its seed.
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)
    items: list[dict] = []
    for d in range(documents):
        size = int(shared.integers(800, 4000))
        nll = size * (0.65 + 0.1 * shared.random()) + size * (shift + 0.005 * own.standard_normal())
        items.append(
            {"kind": "document", "id": f"doc-{d}", "nll": nll, "tokens": size // 4, "bytes": size, "words": size // 6}
        )
        for k in range(5):
            items.append(
                {
                    "kind": "last_word",
                    "id": f"doc-{d}#{k}",
                    "document": f"doc-{d}",
                    "correct": bool(own.random() < rate),
                    "nll": 1.0,
                    "tokens": 1,
                    "target": "people",
                }
            )
    return items


def test_ratios_are_ratios_of_sums_not_means_of_ratios() -> None:
    assert bits_per_byte([math.log(2) * 8, math.log(2) * 1], [8, 2]) == pytest.approx(0.9)
    assert word_perplexity([math.log(3) * 4, math.log(3) * 6], [4, 6]) == pytest.approx(3.0)
    # Two seeds: the mean over seeds of the same sums.
    assert bits_per_byte([[math.log(2), 0.0], [3 * math.log(2), 0.0]], [1, 1]) == pytest.approx(1.0)


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
    assert result.difference.value == pytest.approx((gained - lost) / len(a))


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


def test_small_sample_interval_has_the_width_of_students_t() -> None:
    values = np.array([-1.7, -1.1, -0.6, -0.2, 0.2, 0.6, 1.1, 1.7])
    interval = bootstrap_ratio(values, np.ones(8), resamples=50_000)
    half = scipy_stats.t.ppf(0.975, 7) * values.std(ddof=1) / math.sqrt(8)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.08)


def test_coverage_of_the_bits_per_byte_difference() -> None:
    covered = 0
    for experiment in range(400):
        generator = np.random.default_rng(experiment)
        size = generator.integers(500, 8000, 25).astype(float)
        base = size * generator.gamma(30, 0.023, 25)
        effect = generator.gamma(4, 0.01, 25) - 0.02  # skewed, mean 0.02 nats per byte, independent of size
        interval = paired_ratio_difference(base + size * effect, base, size, resamples=1000, seed=experiment)
        covered += interval.low <= 0.02 / math.log(2) <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


def test_coverage_of_the_clustered_accuracy_difference() -> None:
    covered = 0
    clusters = np.repeat(np.arange(30), 5)
    for experiment in range(400):
        generator = np.random.default_rng(10_000 + experiment)
        # What one document gains is shared by its items: rates .35 + N(0, .15) against .30.
        rate = np.clip(0.35 + 0.15 * generator.standard_normal(30), 0.05, 0.65)[clusters]
        a, b = generator.random(150) < rate, generator.random(150) < 0.30
        interval = paired_accuracy_difference(a, b, clusters, resamples=1000, seed=experiment).difference
        covered += interval.low <= 0.05 <= interval.high
        assert interval.units == 30
    assert 0.92 <= covered / 400 <= 0.98


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_coverage_with_several_seeds(seeds: int) -> None:
    covered = only_units = 0
    for experiment in range(400):
        generator = np.random.default_rng(20_000 + experiment)
        size = np.full(25, 1000.0)
        base = size * generator.gamma(30, 0.023, 25)
        # Seed and document effects of the same size as each other in the mean.
        effect = 0.02 + 0.05 * generator.standard_normal(25) + 0.01 * generator.standard_normal((seeds, 1))
        nll = base + size * effect
        interval = paired_ratio_difference(nll, base, size, resamples=500, seed=experiment)
        covered += interval.low <= 0.02 / math.log(2) <= interval.high
        first = paired_ratio_difference(nll[0], base, size, resamples=500, seed=experiment)
        only_units += first.low <= 0.02 / math.log(2) <= first.high
    assert 0.92 <= covered / 400 <= 0.99
    # One seed's interval does not know training randomness, and must not be read as if it did.
    assert only_units / 400 < 0.90
    assert (interval.covers, first.covers) == ("seeds and units", "units only")


def test_shared_documents_are_not_new_evidence_per_seed() -> None:
    generator = np.random.default_rng(5)
    size = np.full(20, 1000.0)
    difference = 0.03 * size * generator.standard_normal(20)
    one = paired_ratio_difference(difference, np.zeros(20), size)
    four = paired_ratio_difference(np.tile(difference, (4, 1)), np.zeros(20), size)
    assert four.value == pytest.approx(one.value)
    assert four.high - four.low == pytest.approx(one.high - one.low, rel=0.1)


def test_an_arm_against_itself_is_zero() -> None:
    items = make_items(1)
    bits, accuracy = compare(items, items, arm="x", reference="x")
    assert (bits["difference"], bits["low"], bits["high"]) == (0.0, 0.0, 0.0)
    assert (accuracy["difference"], accuracy["gained"], accuracy["lost"], accuracy["p_value"]) == (0.0, 0, 0, 1.0)
    # No discordant item: not certainty, but the exact bound 1 - 0.025^(1/12) on 12 documents.
    assert accuracy["high"] == pytest.approx(1 - 0.025 ** (1 / 12))
    assert accuracy["low"] == -accuracy["high"]


def test_swapping_the_arms_mirrors_the_result() -> None:
    a, b = make_items(1, shift=-0.02), make_items(2)
    for forward, backward in zip(compare(a, b), compare(b, a), strict=True):
        assert forward["difference"] == pytest.approx(-backward["difference"])
        assert forward["low"] == pytest.approx(-backward["high"], abs=0.1 * (forward["high"] - forward["low"]))
        assert forward["p_value"] == backward["p_value"]


def test_order_of_items_and_seeds_does_not_matter() -> None:
    a, b = [make_items(1, shift=-0.02), make_items(2, shift=-0.03)], [make_items(3)]
    mixed = [list(items) for items in a]
    for number, items in enumerate(mixed):
        random.Random(number).shuffle(items)
    for one, other in zip(compare(a, b), compare(mixed[::-1], b), strict=True):
        assert one.keys() == other.keys()
        assert all(one[k] == (pytest.approx(v) if isinstance(v, float) else v) for k, v in other.items())
    assert summarise(a)["bits_per_byte"] == pytest.approx(summarise(mixed)["bits_per_byte"])
    values, size = np.random.default_rng(7).random(30), np.arange(30) + 5.0
    order = np.random.default_rng(8).permutation(30)
    first, second = bootstrap_ratio(values, size), bootstrap_ratio(values[order], size[order])
    assert (first.low, first.high) == (pytest.approx(second.low), pytest.approx(second.high))


def test_the_seed_decides_the_resamples() -> None:
    a, b = make_items(1, shift=-0.02), make_items(2)
    assert compare(a, b, seed=4) == compare(a, b, seed=4)
    assert compare(a, b, seed=4)[0]["low"] != compare(a, b, seed=5)[0]["low"]


def test_comparison_entries_follow_the_contract() -> None:
    a, b = make_items(1, shift=-0.02), make_items(2)
    bits, accuracy = compare(a, b, arm="preskip", reference="none")
    nll = {r["id"]: r["nll"] for r in a if r["kind"] == "document"}
    reference = {r["id"]: (r["nll"], r["bytes"]) for r in b if r["kind"] == "document"}
    expected = sum(nll[i] - reference[i][0] for i in nll) / (math.log(2) * sum(v[1] for v in reference.values()))
    assert bits["difference"] == pytest.approx(expected, rel=1e-12)
    assert bits["low"] < bits["difference"] < bits["high"] < 0
    assert {k: bits[k] for k in ("metric", "arm", "reference", "confidence", "units", "unit", "seeds", "p_value")} == {
        "metric": "bits_per_byte",
        "arm": "preskip",
        "reference": "none",
        "confidence": 0.95,
        "units": 12,
        "unit": "document",
        "seeds": 1,
        "p_value": None,
    }
    correct = {r["id"]: r["correct"] for r in b if r["kind"] == "last_word"}
    pairs = [(r["correct"], correct[r["id"]]) for r in a if r["kind"] == "last_word"]
    assert accuracy["gained"] == sum(x and not y for x, y in pairs)
    assert accuracy["lost"] == sum(y and not x for x, y in pairs)
    assert (accuracy["units"], accuracy["unit"], accuracy["clusters"], accuracy["covers"]) == (
        60,
        "item",
        12,
        "units only",
    )


def test_several_seeds_against_one_reference() -> None:
    a = [make_items(s, shift=-0.02) for s in (1, 2, 3)]
    bits, accuracy = compare(a, make_items(9))
    assert (bits["seeds"], accuracy["seeds"], bits["covers"]) == (3, 3, "seeds and units")
    singles = [compare(items, make_items(9))[0]["difference"] for items in a]
    assert bits["difference"] == pytest.approx(np.mean(singles))
    # Each item counts once in the test, however many seeds.
    assert accuracy["gained"] + accuracy["lost"] <= 60
    with pytest.raises(PreskipError, match="3 seeds and b has 2"):
        compare(a, a[:2])


def test_summary_values_and_bounds() -> None:
    items = make_items(1)
    metrics = summarise([items])
    documents = [r for r in items if r["kind"] == "document"]
    nll, size, words = (np.array([r[k] for r in documents]) for k in ("nll", "bytes", "words"))
    assert metrics["bits_per_byte"]["value"] == pytest.approx(bits_per_byte(nll, size))
    assert metrics["word_perplexity"]["value"] == pytest.approx(word_perplexity(nll, words))
    correct = [r["correct"] for r in items if r["kind"] == "last_word"]
    assert metrics["last_word_accuracy"]["value"] == pytest.approx(np.mean(correct))
    for interval in metrics.values():
        assert interval["low"] < interval["value"] < interval["high"]
    # Never right: no spread to resample, so the exact binomial bound over the 12 documents.
    never = summarise(make_items(1, rate=0.0))["last_word_accuracy"]
    assert (never["value"], never["low"]) == (0.0, 0.0)
    assert never["high"] == pytest.approx(scipy_stats.beta.ppf(0.975, 1, 12))


def test_bad_input_is_refused_with_one_line() -> None:
    ones = np.ones(5)
    cases = [
        (lambda: bootstrap_ratio([1, float("nan"), 2], ones[:3]), "1 NaN or infinite"),
        (lambda: bootstrap_ratio(ones, ones[:4]), "one value per unit"),
        (lambda: bootstrap_ratio(ones[:1], ones[:1]), "too few for an interval"),
        (lambda: bootstrap_ratio(ones, np.zeros(5)), "positive size"),
        (lambda: bootstrap_ratio([], []), "not empty"),
        (lambda: bootstrap_ratio([[1, 2], [3]], [1, 1]), "not a table"),
        (lambda: bootstrap_ratio(ones, ones, confidence=95), "between 0 and 1"),
        (lambda: paired_ratio_difference(ones, ones[:4], ones), "same units"),
        (lambda: paired_accuracy_difference([1, 0, 2], [0, 1, 1]), "other than 0 and 1"),
        (lambda: paired_accuracy_difference([1, 0, 1], [0, 1, 1], ["a", "b"]), "2 cluster labels for 3"),
        (lambda: summarise([]), "no items"),
    ]
    for call, message in cases:
        with pytest.raises(PreskipError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_comparison_refuses_items_that_are_not_shared() -> None:
    a = make_items(1)
    with pytest.raises(
        PreskipError, match=r"do not share their document items \(12 and 11, 1 not shared, such as 'doc-0'"
    ):
        compare(a, a[1:])
    with pytest.raises(PreskipError, match="do not share their last_word items"):
        compare(a, [r for r in a if r["id"] != "doc-3#2"])
    with pytest.raises(PreskipError, match="'doc-0' has different bytes"):
        compare(a, [{**a[0], "bytes": 1}, *a[1:]])
    with pytest.raises(PreskipError, match="'doc-0' occurs twice"):
        compare([*a, a[0]], a)
    with pytest.raises(PreskipError, match="no usable 'nll'"):
        compare(a, [{k: v for k, v in a[0].items() if k != "nll"}, *a[1:]])
