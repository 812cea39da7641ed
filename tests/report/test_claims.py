"""The claims: their verdicts, what they rest on, and what they say when something is missing."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fixture_run import minimal_run, rich_run
from preskip.report.words.answer import answer
from preskip.report.words.claims import assess, combine


def load(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return json.loads((run / "run.json").read_text()), json.loads((run / "results.json").read_text())


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    return load(rich_run(tmp_path_factory.mktemp("rich") / "run", steps=1))


@pytest.fixture(scope="module")
def minimal(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    return load(minimal_run(tmp_path_factory.mktemp("minimal") / "run"))


def by_id(record: dict[str, Any], results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {claim["id"]: claim for claim in assess(record, results)}


def stored(results: dict[str, Any], arm: str, reference: str, name: str, metric: str) -> dict[str, Any]:
    keys = ("arm", "reference", "set", "metric")
    return next(e for e in results["comparisons"] if tuple(e[key] for key in keys) == (arm, reference, name, metric))


@pytest.mark.parametrize(
    ("verdicts", "combined"),
    [
        (["supported", "supported"], "supported"),
        (["supported", "contradicted"], "mixed"),
        (["supported", "not shown"], "not shown"),
        (["supported", "not measured"], "not shown"),
        # One part never outvotes another, in either direction.
        (["contradicted", "contradicted"], "contradicted"),
        (["contradicted", "not shown"], "not shown"),
        (["contradicted", "not measured"], "not shown"),
        (["not shown", "not measured"], "not shown"),
        (["not shown", "not shown"], "not shown"),
        (["not measured"], "not measured"),
        ([], "not measured"),
    ],
)
def test_a_claim_of_several_parts_is_read_carefully(verdicts: list[str], combined: str) -> None:
    assert combine(verdicts) == combined


def test_what_must_hold_together_is_contradicted_by_one_part() -> None:
    assert combine(["supported", "contradicted"], together=True) == "contradicted"


def test_the_verdicts_of_a_rich_run_rest_on_its_comparisons(rich: tuple[dict[str, Any], dict[str, Any]]) -> None:
    record, results = rich
    claims = by_id(record, results)
    assert {name: claim["verdict"] for name, claim in claims.items()} == {
        "lambada": "not shown",
        "perplexity": "mixed",
        "better-than-lora": "mixed",
        "skip-adds": "not shown",
        "together": "contradicted",
        "depth": "mixed",
        "cache": "not measured",
        "control-skip": "mixed",
        "control-parallel": "not shown",
        "control-content": "not shown",
    }
    # What is not shown rests on the part that is not: against none it is contradicted here.
    entry = stored(results, "preskip", "lora", "lambada_openai", "acc")
    claim = claims["lambada"]
    assert [claim[key] for key in ("arm", "reference", "difference", "low", "high")] == [
        entry[key] for key in ("arm", "reference", "difference", "low", "high")
    ]
    assert claim["resolvable"] == pytest.approx(0.72 * (entry["high"] - entry["low"]))
    assert "skip trains 29% of preskip's weights" in claims["control-skip"]["evidence"]
    assert "null band [−0.35, +0.36]: later more" in claims["depth"]["evidence"]


@pytest.mark.parametrize("verdict", ["equivalent", "undecided", "too few units"])
def test_only_the_opposite_contradicts_a_claimed_gain(
    verdict: str, rich: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    record, results = rich
    changed = copy.deepcopy(results)
    for entry in changed["comparisons"]:
        entry["verdict"] = verdict
    claims = by_id(record, changed)
    assert claims["perplexity"]["verdict"] == claims["better-than-lora"]["verdict"] == "not shown"
    for entry in changed["comparisons"]:
        entry["verdict"] = "worse"
    assert by_id(record, changed)["perplexity"]["verdict"] == "contradicted"


def test_of_one_seed_the_words_are_about_this_training(rich: tuple[dict[str, Any], dict[str, Any]]) -> None:
    record, results = copy.deepcopy(rich)
    assert not by_id(record, results)["perplexity"]["one_training"]
    for entry in results["comparisons"]:
        entry["seeds"] = 1
    claim = by_id(record, results)["perplexity"]
    assert claim["one_training"]
    assert "this training of preskip" in claim["evidence"]
    assert "this training of none" not in claim["evidence"]
    results["arms"]["preskip"]["seeds"] = [1]
    assert "this training of preskip is" in answer(results)


def test_a_comparison_stored_the_other_way_is_turned_round(minimal: tuple[dict[str, Any], dict[str, Any]]) -> None:
    record, results = minimal
    changed = copy.deepcopy(results)
    entry = stored(changed, "preskip", "lora", "heldout", "bits_per_byte")
    assert entry["verdict"] == "better"
    before = dict(entry)
    entry.update(arm="lora", reference="preskip", verdict="worse")
    entry.update(difference=-before["difference"], low=-before["high"], high=-before["low"])
    [part] = [p for p in by_id(record, changed)["better-than-lora"]["parts"] if p["entry"]["set"] == "heldout"]
    assert part["verdict"] == "supported"
    assert {key: part["entry"][key] for key in ("arm", "difference", "low", "high")} == {
        key: before[key] for key in ("arm", "difference", "low", "high")
    }
    # Without a stored power analysis: (1.960 + 0.842) / 1.960 half widths.
    half = (before["high"] - before["low"]) / 2
    assert part["resolvable"] == pytest.approx(2.802 / 1.960 * half, rel=1e-3)


def test_what_is_missing_is_named(minimal: tuple[dict[str, Any], dict[str, Any]]) -> None:
    claims = by_id(*minimal)
    assert claims["lambada"]["needs"] == ["the set lambada_openai"]
    assert claims["skip-adds"]["needs"] == ["arm preproj"]
    assert claims["skip-adds"]["evidence"] == "Not measured in this run: needs arm preproj"
    assert claims["control-content"]["verdict"] == "not measured"
    assert claims["depth"]["verdict"] == claims["cache"]["verdict"] == "not measured"
    assert claims["together"]["parts"][1]["entry"]["set"] == "last_word"


def test_unequal_budgets_are_no_comparison_at_equal_budget(minimal: tuple[dict[str, Any], dict[str, Any]]) -> None:
    record, results = copy.deepcopy(minimal)
    results["arms"]["lora"].update(budget="smaller", trainable_parameters=1_000_000)
    claim = by_id(record, results)["better-than-lora"]
    assert claim["verdict"] == "not measured"
    assert "needs equal budgets (they train 34,836,480 (preskip) and 1,000,000 (lora) weights" in claim["evidence"]


def test_a_norm_without_a_null_decides_nothing(rich: tuple[dict[str, Any], dict[str, Any]]) -> None:
    record, results = copy.deepcopy(rich)
    [norm, *_] = results["trend"]["preskip"]
    norm.update(null_low=None, null_high=None)
    results["trend"]["preskip"] = [norm]
    claim = by_id(record, results)["depth"]
    assert claim["verdict"] == "not shown"
    assert "without a null band a norm shows little" in claim["evidence"]


def test_depth_is_not_supported_without_the_ablation(rich: tuple[dict[str, Any], dict[str, Any]]) -> None:
    record, results = copy.deepcopy(rich)
    results["trend"]["preskip"] = [
        {**row, "verdict": "later more"} for row in results["trend"]["preskip"] if row["measure"] != "ablation_skip"
    ]
    claim = by_id(record, results)["depth"]
    assert claim["verdict"] == "not shown"
    assert "needs the loss with one layer's skip off" in claim["evidence"]


@pytest.mark.parametrize(("cost", "verdict"), [(0.002, "supported"), (-0.002, "not shown")])
def test_a_skip_that_hurts_less_and_less_is_no_use_of_it(
    rich: tuple[dict[str, Any], dict[str, Any]], cost: float, verdict: str
) -> None:
    record, results = copy.deepcopy(rich)
    [row] = [row for row in results["trend"]["preskip"] if row["measure"] == "ablation_skip"]
    row["verdict"] = "later more"
    # Rises with depth in both: to a cost, or from a larger gain without it to a smaller one.
    results["ablation"]["preskip"] = {
        "1": [{"layer": layer, "part": "skip", "difference": cost + 2e-4 * layer, "low": cost} for layer in range(8)]
        + [{"layer": 7, "part": "enrichment", "difference": -9.0}]
    }
    [part] = [part for part in by_id(record, results)["depth"]["parts"] if part["title"].startswith("Loss when one")]
    assert part["verdict"] == verdict
    # -0.002 + 5.5 · 2e-4, and the limit of the layers' own.
    assert ("(mean −0.0009 bits per byte, at least −0.0020)" in part["evidence"]) == (cost < 0)


def test_the_later_half_must_be_shown_to_cost_something(rich: tuple[dict[str, Any], dict[str, Any]]) -> None:
    record, results = copy.deepcopy(rich)
    [row] = [row for row in results["trend"]["preskip"] if row["measure"] == "ablation_skip"]
    row["verdict"] = "later more"

    def layers(cost: float) -> list[dict[str, Any]]:
        return [{"layer": layer, "part": "skip", "difference": cost + 1e-6 * layer, "low": cost} for layer in range(8)]

    for costs, verdict in (((0.002, 0.0021, 0.0019), "supported"), ((0.006, 0.0005, -0.0003), "not shown")):
        results["ablation"]["preskip"] = {str(seed): layers(cost) for seed, cost in enumerate(costs)}
        [part] = [part for part in by_id(record, results)["depth"]["parts"] if part["title"].startswith("Loss when")]
        assert part["verdict"] == verdict


def test_what_was_not_declared_is_called_exploratory(rich: tuple[dict[str, Any], dict[str, Any]]) -> None:
    record, results = copy.deepcopy(rich)
    assert "exploratory" not in by_id(record, results)["skip-adds"]["evidence"]
    for entry in results["comparisons"]:
        entry["declared"] = False
    assert "not declared before training: exploratory" in by_id(record, results)["skip-adds"]["evidence"]


@pytest.mark.parametrize(("size", "verdict"), [(4096, "supported"), (5000, "contradicted")])
def test_the_cache_is_judged_by_its_bytes(rich: tuple[dict[str, Any], dict[str, Any]], size: int, verdict: str) -> None:
    record, results = rich
    claim = by_id(record, {**results, "kv_cache": {"base_bytes": 4096, "arm_bytes": size}})["cache"]
    assert claim["verdict"] == verdict
    assert f"{size:,} bytes" in claim["evidence"]


def test_claims_need_no_torch() -> None:
    code = "import sys, preskip.report.words.claims, preskip.cli.tables; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
