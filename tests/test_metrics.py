"""One table: what it says of a metric is what the verdict, the words, the plan and the figure say."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import preskip
from preskip.metrics import DEFAULT_MARGINS, METRICS, Metric, metric_named
from preskip.report.comparison_tables import comparison_groups
from preskip.report.plots.forest import forest_records
from preskip.stats.verdicts import verdict_of

LOWER = ["bits_per_byte", "word_perplexity", "byte_perplexity", "perplexity", "nll", "loss"]


def difference(metric: str, **changes: object) -> dict:
    entry = {"set": "s", "metric": metric, "arm": "a", "reference": "b", "p_value": 0.01, "difference": -0.1}
    more = {"low": -0.2, "high": -0.01, "margin": None, "units": 9, "clusters": None, "unit": "item", "seeds": 1}
    return {**entry, **more, **changes}


def page(metric: str, described: dict | None = None) -> dict:
    """The group of comparisons on the report's page, the better difference first."""
    entries = [difference(metric, verdict="better"), difference(metric, arm="c", difference=0.1, verdict="worse")]
    (group,) = comparison_groups({"sets": {"s": {"domain": "in", **(described or {})}}, "comparisons": entries})
    return group


@pytest.mark.parametrize("metric", [*METRICS, "acc,none", "perplexity,strict", "f1", "neg_bias"])
def test_the_verdict_and_the_page_say_the_same_direction(metric: str) -> None:
    lower = metric.split(",")[0] in LOWER
    assert metric_named(metric).lower_is_better == lower
    assert verdict_of(difference(metric)) == ("better" if lower else "worse")
    assert page(metric)["note"] == ("lower is better" if lower else "higher is better")
    assert page(metric)["others"].rows[0][0].text == ("a − b" if lower else "c − b")


@pytest.mark.parametrize("metric", ["acc", "perplexity,strict", "bias"])
@pytest.mark.parametrize("higher", [True, False])
def test_what_lm_eval_states_of_a_set_goes_before_the_table(metric: str, higher: bool) -> None:
    described = {"higher_is_better": {metric.split(",")[0]: higher, "other": not higher}}
    assert verdict_of(difference(metric), described=described) == ("worse" if higher else "better")
    assert page(metric, described)["note"] == ("higher is better" if higher else "lower is better")
    both = [difference(metric, verdict="x"), difference(metric, arm="c", verdict="x")]
    drawn = forest_records(both, metric_named(metric, described), "none")
    assert [record["pair"] for record in drawn] == ["a − b", "c − b"]
    # A set that states nothing of the metric leaves the table's word.
    assert metric_named(metric, {"higher_is_better": {"other": True}}) == metric_named(metric)


def test_values_that_stored_runs_rest_on() -> None:
    assert DEFAULT_MARGINS == {"bits_per_byte": 0.005, "nll": 0.02, "acc": 0.01, "acc_norm": 0.01, "exact_match": 0.01}
    assumed = {key: (metric.unit_deviation, metric.seed_deviation) for key, metric in METRICS.items()}
    accuracy = (0.1**0.5, 0.005)
    assert {key: value for key, value in assumed.items() if value[0] is not None} == {
        "bits_per_byte": (0.025, 0.002),
        "nll": (1.0, 0.02),
        **dict.fromkeys(("acc", "acc_norm", "exact_match"), accuracy),
    }
    assert [key for key, metric in METRICS.items() if metric.factor == 100.0] == ["acc", "acc_norm", "exact_match"]


def test_a_filter_is_named_and_an_unknown_metric_keeps_its_key() -> None:
    exact = METRICS["exact_match"]
    named = replace(exact, name="Exact match (strict)", phrase="exact match (strict)")
    assert metric_named("exact_match,strict") == named
    assert metric_named("f1_macro") == Metric(key="f1_macro", name="F1 macro", phrase="f1 macro", lower_is_better=False)


NEW_METRIC = """
    Metric(
        key="ece",
        name="Calibration error",
        phrase="calibration error",
        column="ECE",
        difference_unit=" points",
        factor=100.0,
        margin=0.02,
        unit_deviation=0.2,
        seed_deviation=0.01,
        minimum_decimals=1,
    ),"""
USED = """
from preskip.cli.tables import _unit
from preskip.metrics import metric_named
from preskip.report.plots.forest import forest, forest_records
from preskip.report.words.verdicts import sentence
from preskip.stats import compare_arms, planned_power

def items(shift):
    scores = [{"ece": 0.3 + shift + 0.01 * (number % 7)} for number in range(60)]
    return [{"set": "s", "kind": "item", "id": str(i), "scores": own} for i, own in enumerate(scores)]

def family(metric):
    return {"declared": [{"arm": "a", "reference": "none", "set": "s", "metric": metric}]}

sets = {"s": {"kind": "item", "items": 60, "title": "S"}}
(entry,) = compare_arms({"none": {0: items(0)}, "a": {0: items(-0.05)}}, family("ece"), sets)
assert (entry["verdict"], entry["margin"]) == ("better", 0.02), entry
assert sentence(entry, sets) == (
    "this training of a lowers calibration error on S by 5.0 [5.0, 5.0] points against none"
)
assert _unit("ece") == "ECE"
(plan,) = planned_power(sets, 3, family("ece"))
assert plan["design"]["seed_deviation"] == 0.01, plan
assert abs(plan["design"]["unit_deviation"] - 0.2 * 0.5**0.5) < 1e-12, plan
records = forest_records([entry], metric_named("ece"), "none")
assert abs(records[0]["difference"] + 5) < 1e-9, records
assert records[0]["margin"] == 2.0, records
assert "Difference, points" in str(forest(records, metric_named("ece")))
assert planned_power(sets, 3, family("unknown")) == []
"""


def test_a_new_metric_is_one_entry(tmp_path: Path) -> None:
    """Judged, put into words, planned for and drawn by what its entry says, with no other file touched."""
    source, copy = Path(preskip.__file__).parent, tmp_path / "preskip"
    copy.mkdir()
    for path in source.iterdir():
        (copy / path.name).symlink_to(path)
    text = (source / "metrics.py").read_text()
    (copy / "metrics.py").unlink()
    (copy / "metrics.py").write_text(text.replace("_ENTRIES = (", f"_ENTRIES = ({NEW_METRIC}"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", USED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
