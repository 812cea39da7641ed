"""Summaries and comparisons from item records: values by hand, pairing of seeds and items, refusals."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy import stats as scipy_stats

from preskip.errors import PreskipError
from preskip.stats import compare, compare_arms, mcnemar, summarise
from stored_runs import make_items


def by_metric(entries: list[dict]) -> dict[str, dict]:
    return {entry["metric"]: entry for entry in entries}


def of_documents(nll: list[float], sizes: list[int]) -> list[dict]:
    """Documents of so many nats, each of as many words as bytes."""
    return [
        {"set": "heldout", "kind": "document", "id": str(i), "nll": nats, "bytes": size, "words": size}
        for i, (nats, size) in enumerate(zip(nll, sizes, strict=True))
    ]


def test_summary_values_and_bounds() -> None:
    items = make_items(1)
    metrics = summarise([items])
    documents = [r for r in items if r["kind"] == "document"]
    nll, size, words = (np.array([r[k] for r in documents]) for k in ("nll", "bytes", "words"))
    assert metrics["heldout"]["bits_per_byte"]["value"] == pytest.approx(nll.sum() / math.log(2) / size.sum())
    assert metrics["heldout"]["word_perplexity"]["value"] == pytest.approx(math.exp(nll.sum() / words.sum()))
    for score in ("acc", "nll"):
        mean = np.mean([r["scores"][score] for r in items if r["kind"] == "item"])
        assert metrics["cloze"][score]["value"] == pytest.approx(mean)
    for interval in (*metrics["heldout"].values(), *metrics["cloze"].values()):
        assert interval["low"] < interval["value"] < interval["high"]
    # Never right: no spread to resample, so the exact binomial bound over the 12 documents that are the clusters.
    never = summarise(make_items(1, rate=0.0))["cloze"]["acc"]
    assert (never["value"], never["low"]) == (0.0, 0.0)
    assert never["high"] == pytest.approx(scipy_stats.beta.ppf(0.975, 1, 12))


def test_ratios_are_ratios_of_sums_not_means_of_ratios() -> None:
    def figures(nll: list[float], sizes: list[int]) -> dict[str, float]:
        return {key: value["value"] for key, value in summarise(of_documents(nll, sizes))["heldout"].items()}

    assert figures([math.log(2) * 8, math.log(2) * 1], [8, 2])["bits_per_byte"] == pytest.approx(0.9)
    assert figures([math.log(3) * 4, math.log(3) * 6], [4, 6])["word_perplexity"] == pytest.approx(3.0)
    # Two seeds: the mean over seeds of the same sums.
    seeds = [of_documents(nll, [1, 1]) for nll in ([math.log(2), 0.0], [3 * math.log(2), 0.0])]
    assert summarise(seeds)["heldout"]["bits_per_byte"]["value"] == pytest.approx(1.0)
    with pytest.raises(PreskipError, match="beyond floating point"):
        figures([1000.0, 1000.0], [1, 1])


def test_a_set_of_which_every_item_failed_loses_no_other() -> None:
    good = make_items(1)
    bad = [{**row, "scores": {}, "failed": "no module named x"} if row["set"] == "cloze" else row for row in good]
    notes: list[str] = []
    metrics = summarise(bad, notes=notes)
    assert list(metrics) == list(summarise(good))
    assert (metrics["cloze"], metrics["heldout"]) == ({}, summarise(good)["heldout"])
    entries = compare_arms({"a": good, "b": bad}, {}, notes=notes)
    assert {entry["set"] for entry in entries} == {"heldout"}
    why = "every item of cloze has failed in some seed or arm (no module named x)"
    assert notes == [f"the seeds of one arm: {why}; it is left out", f"b and a: {why}; it is left out"]
    assert compare_arms({"a": good, "b": bad}, {}) == entries
    only = [row for row in bad if row["set"] == "cloze"]
    for compared in (lambda: summarise(only), lambda: compare_arms({"a": good, "b": bad}, {}, sets=["cloze"])):
        with pytest.raises(PreskipError, match="every item of cloze has failed"):
            compared()


def test_a_record_without_a_set_is_refused_in_one_line() -> None:
    damaged = [{key: value for key, value in row.items() if key != "set"} for row in make_items(1)]
    with pytest.raises(PreskipError, match=r"lacks set, id or kind: .* items.jsonl is damaged"):
        summarise(damaged)


def test_comparison_entries_follow_the_schema() -> None:
    a, b = make_items(1, shift=-0.02), make_items(2)
    entries = compare(a, b, arm="preskip", reference="none")
    assert [(entry["set"], entry["metric"]) for entry in entries] == [
        ("heldout", "bits_per_byte"),
        ("cloze", "acc"),
        ("cloze", "nll"),
    ]
    bits, accuracy, loss = entries
    nll = {r["id"]: r["nll"] for r in a if r["kind"] == "document"}
    reference = {r["id"]: (r["nll"], r["bytes"]) for r in b if r["kind"] == "document"}
    expected = sum(nll[i] - reference[i][0] for i in nll) / (math.log(2) * sum(v[1] for v in reference.values()))
    assert bits["difference"] == pytest.approx(expected, rel=1e-12)
    assert bits["low"] < bits["difference"] < bits["high"] < 0
    assert bits["p_value"] < 0.05
    common = {"arm": "preskip", "reference": "none", "confidence": 0.95, "seeds": 1}
    assert (
        bits.items()
        >= {
            **common,
            "units": 12,
            "unit": "document",
            "clusters": None,
            "covers": "documents only",
            "gained": None,
            "lost": None,
            "margin": 0.005,
        }.items()
    )
    assert accuracy.items() >= {**common, "units": 60, "unit": "item", "clusters": 12, "covers": "items only"}.items()
    right = {r["id"]: r["scores"]["acc"] for r in b if r["kind"] == "item"}
    pairs = [(r["scores"]["acc"], right[r["id"]]) for r in a if r["kind"] == "item"]
    assert accuracy["gained"] == sum(x > y for x, y in pairs)
    assert accuracy["lost"] == sum(x < y for x, y in pairs)
    assert accuracy["p_value"] >= mcnemar(accuracy["gained"], accuracy["lost"])
    assert (loss["gained"], loss["lost"], loss["margin"]) == (None, None, 0.02)


def test_independent_items_of_one_seed_have_the_exact_mcnemar_p() -> None:
    a, b = ([{**r, "cluster": None} for r in make_items(s)] for s in (1, 2))
    accuracy = by_metric(compare(a, b))["acc"]
    assert accuracy["clusters"] is None
    assert accuracy["p_value"] == mcnemar(accuracy["gained"], accuracy["lost"])


def test_clusters_of_documents_widen_the_interval() -> None:
    a, b = make_items(1, documents=40), make_items(2, documents=40)
    # The pieces of one book share what they gain.
    for number, record in enumerate(r for r in a if r["kind"] == "document"):
        record["nll"] += record["bytes"] * 0.02 * math.sin(number // 8)
    alone = compare(a, b, sets=["heldout"])[0]
    books = [
        [{**r, "cluster": f"book-{int(r['id'][4:]) // 8}"} for r in items if r["kind"] == "document"]
        for items in (a, b)
    ]
    together = compare(*books)[0]
    assert (together["units"], together["clusters"]) == (40, 5)
    assert together["difference"] == pytest.approx(alone["difference"])
    assert together["high"] - together["low"] > 1.5 * (alone["high"] - alone["low"])


def test_an_arm_against_itself_is_zero_and_equivalent() -> None:
    items = make_items(1)
    entries = by_metric(compare(items, items, arm="x", reference="y"))
    for metric in ("bits_per_byte", "nll"):
        entry = entries[metric]
        assert (entry["difference"], entry["low"], entry["high"], entry["p_value"]) == (0, 0, 0, 1)
        assert entry["p_equivalence"] == 2.0**-12
    # No discordant item: not certainty, but the exact bound 1 - 0.025^(1/12) on 12 documents.
    accuracy = entries["acc"]
    assert (accuracy["difference"], accuracy["gained"], accuracy["lost"], accuracy["p_value"]) == (0.0, 0, 0, 1.0)
    assert accuracy["high"] == pytest.approx(1 - 0.025 ** (1 / 12)) == -accuracy["low"]
    assert accuracy["p_equivalence"] == 0.5  # 0.99^12 = 0.89 is more


def test_swapping_the_arms_mirrors_the_result() -> None:
    a, b = make_items(1, shift=-0.02), make_items(2)
    for forward, backward in zip(compare(a, b), compare(b, a), strict=True):
        assert forward["difference"] == pytest.approx(-backward["difference"])
        width = forward["high"] - forward["low"]
        assert forward["low"] == pytest.approx(-backward["high"], abs=0.1 * width)
        assert forward["p_value"] == pytest.approx(backward["p_value"], rel=0.2, abs=1e-3)


def test_seeds_pair_by_id_not_by_order() -> None:
    cells = {seed: make_items(seed, shift=-0.01 * seed) for seed in (1, 2, 3)}
    others = {seed: make_items(seed + 10, shift=-0.01 * seed) for seed in (3, 1, 2)}
    by_id = compare(cells, others)[0]
    assert by_id["seeds"] == 3
    in_order = compare([cells[s] for s in (1, 2, 3)], [others[s] for s in (1, 2, 3)])[0]
    assert by_id["difference"] == pytest.approx(in_order["difference"])
    assert (by_id["low"], by_id["high"]) == (pytest.approx(in_order["low"]), pytest.approx(in_order["high"]))
    # Paired by id the seeds' shifts cancel; crossed over they would not.
    crossed = compare([cells[s] for s in (1, 2, 3)], [others[s] for s in (3, 1, 2)])[0]
    assert crossed["high"] - crossed["low"] > 3 * (by_id["high"] - by_id["low"])
    # Only what both have is compared.
    common = compare(cells, {seed: others[seed] for seed in (2, 3)} | {9: make_items(9)})[0]
    assert (common["seeds"], common["covers"]) == (2, "seeds and documents")
    one = compare(cells, {2: others[2]})[0]
    assert (one["seeds"], one["difference"]) == (1, pytest.approx(compare(cells[2], others[2])[0]["difference"]))


def test_the_untrained_reference_serves_every_seed() -> None:
    a = {s: make_items(s, shift=-0.02) for s in (1, 2, 3)}
    for name in ("none", "first-run:none"):
        bits, accuracy, _ = compare(a, {42: make_items(9)}, arm="preskip", reference=name)
        assert (bits["seeds"], bits["covers"]) == (3, "seeds and documents")
        singles = [compare(items, make_items(9))[0]["difference"] for items in a.values()]
        assert bits["difference"] == pytest.approx(np.mean(singles))
        # Each item counts once in the test, however many seeds.
        assert accuracy["gained"] + accuracy["lost"] <= 60
    with pytest.raises(PreskipError, match=r"lora \(seeds 42\) have no seed in common"):
        compare(a, {42: make_items(9)}, arm="preskip", reference="lora")
    with pytest.raises(PreskipError, match="3 seeds and b has 2"):
        compare(list(a.values()), list(a.values())[:2])


def test_order_of_items_does_not_matter() -> None:
    a, b = [make_items(1, shift=-0.02), make_items(2, shift=-0.03)], [make_items(3)]
    mixed = [list(items) for items in a]
    for number, items in enumerate(mixed):
        random.Random(number).shuffle(items)
        items.sort(key=lambda record: record["set"] != "heldout")  # the order of sets is that of the output
    for one, other in zip(compare(a, b), compare(mixed[::-1], b), strict=True):
        for key in ("set", "metric", "units", "gained", "lost"):
            assert one[key] == other[key]
        for key in ("difference", "low", "high", "p_value", "p_equivalence"):
            assert one[key] == pytest.approx(other[key], rel=1e-6)
    assert summarise(a)["heldout"]["bits_per_byte"] == pytest.approx(summarise(mixed)["heldout"]["bits_per_byte"])


def test_all_pairs_once_as_declared_or_later_minus_earlier() -> None:
    arms = {
        "none": {0: make_items(0)},
        "lora": {1: make_items(1), 2: make_items(2)},
        "preskip": {1: make_items(3, shift=-0.02), 2: make_items(4, shift=-0.02)},
    }
    declared = [{"arm": "lora", "reference": "preskip", "set": "heldout", "metric": "bits_per_byte"}]
    ticks: list[int] = []
    entries = compare_arms(
        arms, {"declared": declared}, sets=["heldout"], advance=lambda done, note: ticks.append(done)
    )
    assert [(e["arm"], e["reference"], e["declared"]) for e in entries] == [
        ("lora", "none", False),
        ("preskip", "none", False),
        ("lora", "preskip", True),
    ]
    assert ticks == [1, 2, 3]
    assert entries[2]["p_holm"] == entries[2]["p_value"]


def test_corrected_p_values_are_those_of_the_family_whatever_is_shown() -> None:
    items = {"none": {1: make_items(5)}}
    items |= {arm: {1: make_items(seed, shift=shift)} for arm, seed, shift in (("a", 1, -0.02), ("b", 2, -0.004))}
    declared = [
        {"arm": "a", "reference": "none", "set": "heldout", "metric": "bits_per_byte", "level": 1},
        {"arm": "a", "reference": "b", "set": "heldout", "metric": "bits_per_byte", "level": 2},
        {"arm": "a", "reference": "b", "set": "cloze", "metric": "acc", "level": 2},
    ]
    family = {"declared": declared, "procedure": "gatekeeping", "alpha": 0.05, "margins": {}}

    def corrected(**chosen: object) -> dict:
        found = compare_arms(items, family, **chosen)
        return {(e["arm"], e["reference"], e["metric"]): (e["p_holm"], e["verdict"]) for e in found if e["declared"]}

    every = corrected()
    assert every["a", "b", "bits_per_byte"][1] == "better"  # the gate is open
    assert every["a", "b", "acc"][0] < 1.0
    assert corrected(pairs=[("a", "b")]) == {key: every[key] for key in every if key[1] == "b"}
    assert corrected(sets=["cloze"]) == {key: every[key] for key in every if key[2] == "acc"}


def test_an_accuracy_may_be_a_share_of_an_item() -> None:
    """As in truthfulqa_mc2, whose `acc` is the probability of the true answers."""

    def records(shares):
        return [{"set": "mc2", "id": str(i), "kind": "item", "scores": {"acc": x}} for i, x in enumerate(shares)]

    shares = np.random.default_rng(0).random(50)
    (entry,) = compare(records(shares + 0.1), records(shares))
    assert entry["difference"] == pytest.approx(0.1)
    assert entry["gained"] is None
    assert summarise(records(shares))["mc2"]["acc"]["value"] == pytest.approx(shares.mean())


def test_what_cannot_be_compared_is_refused_with_one_line() -> None:
    a = make_items(1)
    document, item = a[0], a[1]
    cases = [
        (a, a[1:], r"do not share the items of heldout \(12 and 11, 11 shared; not shared: 'doc-0'\)"),
        (a, [r for r in a if r["id"] != "doc-3#2"], "do not share the items of cloze"),
        (a, [{**document, "bytes": 1}, *a[1:]], "'doc-0' of heldout has different bytes"),
        ([*a, document], a, "'doc-0' of heldout occurs twice"),
        (a, [{k: v for k, v in document.items() if k != "nll"}, *a[1:]], "no usable 'nll'"),
        (a, [document, {**item, "scores": {}}, *a[2:]], "of cloze has no usable 'acc'"),
        (a, [{k: v for k, v in document.items() if k != "set"}, *a[1:]], "lacks set, id or kind"),
        (a, [{**r, "set": "other"} for r in a], "share no evaluation set"),
        (a, [{**document, "kind": "item"}, *a[1:]], "mixes documents and items"),
        ([], a, "no items: evaluate it first"),
    ]
    for one, other, message in cases:
        with pytest.raises(PreskipError, match=message) as caught:
            compare(one, other)
        assert "\n" not in str(caught.value)
    with pytest.raises(PreskipError, match="do not share the set 'wiki': they share heldout, cloze"):
        compare(a, a, sets=["wiki"])
    with pytest.raises(PreskipError, match="must lie between 0 and 1"):
        compare(a, a, confidence=95)
