"""Records of the plots against the stored numbers, and what keeps the arms apart."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pytest
from jsonschema import ValidationError

from fixture_explain import write_explain
from fixture_run import minimal_run, rich_run
from preskip.metrics import metric_named
from preskip.report.explain.figures import explain_figures
from preskip.report.figures import make_figures
from preskip.report.load import load_curves
from preskip.report.plots import base, depth, forest, plane, search, training

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rich_run(tmp_path_factory.mktemp("rich") / "run", steps=12)


@pytest.fixture(scope="module")
def results(rich: Path) -> dict[str, Any]:
    return json.loads((rich / "results.json").read_text())


def test_arms_differ_in_colour_or_shape_and_dash() -> None:
    arms = [str(number) for number in range(32)]
    for marks in (base.shapes(arms), base.dashes(arms)):
        looks = {(index % base.COLOURS, str(mark)) for index, mark in enumerate(marks)}
        assert len(looks) == len(arms)


def test_all_figures_of_a_rich_and_a_minimal_run(rich: Path, results: dict[str, Any], tmp_path: Path) -> None:
    figures = make_figures(results, load_curves(rich, results))
    keys = [figure["key"] for figure in figures]
    assert len(keys) == len(set(keys))
    assert keys[:9] == [
        "overview-wikitext2",
        "overview-lambada_openai",
        "overview-books",
        "plane-lambada_openai",
        "plane-books",
        "forest-wikitext2-bits_per_byte",
        "forest-lambada_openai-acc",
        "forest-lambada_openai-nll",
        "forest-books-bits_per_byte",
    ]
    assert [key for key in keys if key.startswith("search-")] == [f"search-{arm}" for arm in list(results["arms"])[1:]]
    assert {"norm-skip_norm-preskip", "equal-step-skip_norm-preskip", "norm-down_norm-preproj"} <= set(keys)
    assert {"ablation-skip-preskip", "ablation-enrichment-preskip", "ablation-skip-skip"} <= set(keys)
    assert all(figure["alt"] for figure in figures)
    # "Data" on the page saves what stands at the top of a specification.
    assert all(figure["spec"]["data"]["values"] for figure in figures)
    run = minimal_run(tmp_path / "run")
    stored = json.loads((run / "results.json").read_text())
    assert [figure["key"] for figure in make_figures(stored, load_curves(run, stored))] == [
        "overview-heldout",
        "overview-last_word",
        "forest-heldout-bits_per_byte",
        "forest-last_word-acc",
        "forest-last_word-nll",
        "training",
        "depth-skip_to_attention",
        "depth-enrichment",
        "norm-skip_norm-preskip",
    ]


def test_every_chart_is_valid(rich: Path, results: dict[str, Any], tmp_path: Path) -> None:
    """What is drawn unchecked, since checking takes as long as drawing."""
    run = minimal_run(tmp_path / "run")
    figures = make_figures(results, load_curves(rich, results))
    figures += make_figures(json.loads((run / "results.json").read_text()), [])
    figures += explain_figures(json.loads(write_explain(tmp_path / "explain", documents=1).read_text()))
    assert len(figures) > 40
    for figure in figures:
        spec = figure["spec"]
        alt.LayerChart.from_dict({**spec, "data": {"values": spec["data"]["values"][:3]}})
    with pytest.raises(ValidationError, match="'tall' is not of type 'number'"):
        alt.LayerChart.from_dict({**figures[0]["spec"], "height": "tall"})


def test_the_forest_draws_the_declared_pairs_in_order(results: dict[str, Any]) -> None:
    entries = [e for e in results["comparisons"] if (e["set"], e["metric"]) == ("lambada_openai", "acc")]
    records = forest.forest_records(entries, metric_named("acc"), "none")
    assert len(entries) == 36
    assert len(records) == 15
    against_none = [row["difference"] for row in records[:8]]
    assert all(row["pair"].endswith("none") for row in records[:8])
    assert against_none == sorted(against_none, reverse=True)  # accuracy: the highest is best
    [entry] = [e for e in entries if (e["arm"], e["reference"]) == ("preskip", "none")]
    [row] = [row for row in records if row["pair"] == "preskip − none"]
    assert row["difference"] == pytest.approx(100 * entry["difference"])
    assert (row["margin_low"], row["margin"]) == pytest.approx((-1.0, 1.0))
    assert row["outcome"] == entry["verdict"]
    assert row["p"].endswith(" (corrected)")
    spec = forest.forest([row, {**row, "declared": False}], metric_named("acc"))
    styles = {layer["transform"][0]["filter"]: layer["mark"].get("style") for layer in spec["layer"][-2:]}
    assert styles == {"datum.declared": None, "!datum.declared": "hollow"}


def test_the_plane_shows_benefits(results: dict[str, Any]) -> None:
    records = plane.plane_records(results, "wikitext2", "books")
    tests = {row["arm"]: row for row in records if row["part"] == "test"}
    assert list(tests) == list(results["arms"])[1:]
    [home] = [
        e for e in results["comparisons"] if (e["set"], e["arm"], e["reference"]) == ("wikitext2", "lora", "none")
    ]
    lora = tests["lora"]
    assert (lora["x"], lora["x_low"], lora["x_high"]) == (-home["difference"], -home["high"], -home["low"])
    assert lora["y"] < 0  # LoRA loses on books, so it stands below the line
    grid = [row for row in records if row["part"] == "grid" and row["arm"] == "preproj"]
    trace = [point for point in results["search"]["preproj"]["trace"] if not point["diverged"]]
    assert [row["x"] for row in grid] == [-point["dev"]["in"]["value"] for point in trace]
    assert [row["y"] for row in grid] == [-point["dev"]["out"]["books"]["value"] for point in trace]
    chosen = [row for row in grid if row["chosen"]]
    assert [(row["learning_rate"], row["rung"]) for row in chosen] == [(1e-3, 2)]
    # Points of accuracy and the search's bits per byte share no axis.
    assert {row["part"] for row in plane.plane_records(results, "wikitext2", "lambada_openai")} == {"test"}


def test_what_the_search_scored_in_place_of_a_task_has_its_own_plane(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    for searched in changed["search"].values():
        for point in searched["trace"]:
            if not point["diverged"]:
                point["dev"]["out"]["lambada_development"] = {"value": -0.03, "low": -0.04, "high": -0.02}
    keys = [figure["key"] for figure in make_figures(results, [])]
    [own] = [figure for figure in make_figures(changed, []) if figure["key"] not in keys]
    assert (own["key"], own["section"]) == ("plane-lambada_development", "search-plane")
    marks = plane.grid_records(changed, "preskip", "lambada_development")
    assert {row["y"] for row in marks} == {0.03}


def test_rates_that_ruin_the_model_do_not_make_the_plane_small(results: dict[str, Any]) -> None:
    records = plane.plane_records(results, "wikitext2", "books")
    before, far = plane.outside(records), max(abs(row["x"]) for row in records)
    grid = next(row for row in records if row["part"] == "grid")
    ruined = {**grid, "last": False, "x": -10 * far, "y": -10 * far}
    assert plane.outside([*records, ruined]) == before + 1
    spec = plane.plane([*records, ruined], results, "wikitext2", "books")
    ends = [scale["domainMin"]["expr"] for scale in found(spec, "scale") if "domainMin" in scale]
    wide, near = ({float(text.split()[place]) for text in ends} for place in (2, 4))
    assert len(wide) == len(near) == 2  # of both axes: over the search's traces, and over the test scores alone
    assert min(wide) > -10 * far
    tests = [row for row in records if row["part"] == "test"]
    assert near == {min(0, *(row[f"{axis}_low"] for row in tests)) for axis in ("x", "y")}


def test_traces_of_the_search_wait_for_the_switch(results: dict[str, Any]) -> None:
    records = plane.plane_records(results, "wikitext2", "books")
    spec = plane.plane(records, results, "wikitext2", "books")
    assert spec["params"] == [{"name": "traces", "value": False}]
    for layer in spec["layer"]:
        of_the_search = any("grid" in step.get("filter", "") for step in layer.get("transform", []))
        assert layer.get("name", "").startswith("traces") == of_the_search
    tests = [row for row in records if row["part"] == "test"]
    assert "params" not in plane.plane(tests, results, "wikitext2", "books")


def test_lines_are_means_over_seeds_on_bands(results: dict[str, Any], rich: Path) -> None:
    records = training.training_records(load_curves(rich, results))
    several = training.training(records, list(results["arms"]))
    assert [layer["mark"]["type"] for layer in several["layer"]] == ["area", "line"]
    [step] = several["layer"][1]["transform"]
    assert step["groupby"] == ["arm", "step"]
    operations = {entry["as"]: (entry["op"], entry["field"]) for entry in step["aggregate"]}
    assert operations == {name: (op, "smoothed") for name, op in (("mean", "mean"), ("low", "min"), ("high", "max"))}
    one = [row for row in records if row["seed"] == records[0]["seed"] and row["arm"] in ("lora", "preskip")]
    assert [layer["mark"]["type"] for layer in training.training(one, ["lora", "preskip"])["layer"]] == ["line"] * 2
    # Of one seed a layer's stored interval is the band, of several the lowest and the highest seed.
    for seeds, fields in ((("1",), ("low", "high")), (("1", "2"), ("value", "value"))):
        rows = [{"arm": "a", "seed": s, "layer": 0, "value": 1.0, "low": 0.5, "high": 2.0} for s in seeds]
        [step] = depth.depth(rows, ["a"], "enrichment")["layer"][0]["transform"]
        found_fields = {entry["as"]: entry["field"] for entry in step["aggregate"]}
        assert (found_fields["bottom"], found_fields["top"]) == fields
    bare = depth.depth([{"arm": "a", "seed": "1", "layer": 0, "value": 1.0, "low": None}], ["a"], "enrichment")
    assert [layer["mark"]["type"] for layer in bare["layer"]] == ["line", "point"]


def test_corners_that_are_not_drawn_are_not_named(results: dict[str, Any]) -> None:
    right = [
        {**row, "x": 1.0, "x_low": 0.9, "x_high": 1.1} for row in plane.plane_records(results, "wikitext2", "books")
    ]
    words = json.dumps(plane.plane(right, results, "wikitext2", "books"))
    assert "better in-domain only" in words
    assert "worse in both" not in words


def found(spec: Any, key: str) -> list[Any]:
    """Every value of a key, however deep."""
    if isinstance(spec, dict):
        own = [spec[key]] if isinstance(spec.get(key), dict) else []
        return own + [value for child in spec.values() for value in found(child, key)]
    return [value for child in spec for value in found(child, key)] if isinstance(spec, list) else []


def test_a_search_for_every_seed_says_what_each_reaches() -> None:
    results = json.loads((RESULTS / "confirmatory-smollm2-wikitext2" / "results.json").read_text())
    drawn = {figure["key"]: figure["alt"] for figure in make_figures(results, [])}
    reached = [
        f"{row['dev']['in']['value']:+.4f}"
        for row in results["search"]["preskip"]["trace"]
        if row["rung"] == 1 and row["kept"]
    ]
    assert len(set(reached)) == 5
    assert (
        f"0.000281, 8.89e-05, 8.89e-05, 8.89e-05, 8.89e-05, where it reaches {', '.join(reached)} bits"
        in drawn["search-preskip"]
    )


def test_the_search_marks_chosen_and_diverged(results: dict[str, Any]) -> None:
    records = search.search_records(results["search"]["preproj"], "preproj")
    assert len(records) == len(results["search"]["preproj"]["trace"])
    assert [(r["learning_rate"], r["value"]) for r in records if r["diverged"]] == [(0.01, None)]
    assert sum(record["chosen"] for record in records) == 1
    low, high = search.shared_bounds(records)
    assert low < min(r["low"] for r in records if r["low"] is not None)
    assert high > 0
    assert search.rung_dashes(3) == [[2, 3], [5, 3], [1, 0]]


def test_the_noise_band_is_one_for_all_layers(results: dict[str, Any]) -> None:
    records = depth.norm_records(results, "preskip", "skip_norm")
    bands = [row for row in records if row["part"] == "null" and row["null"] == "noise gradients"]
    values = [row["skip_norm"] for run in results["nulls"]["noise"]["preskip"] for row in run["layers"]]
    low, high = np.quantile(values, [0.025, 0.975])
    assert [row["layer"] for row in bands] == list(range(30))
    assert all((row["low"], row["high"]) == pytest.approx((low, high)) for row in bands)
    assert len([row for row in records if row["part"] == "arm"]) == 90


def test_an_absent_skip_is_not_drawn(results: dict[str, Any]) -> None:
    assert {row["arm"] for row in depth.depth_records(results["depth"], "skip_norm")} == {"preskip", "skip", "content"}


def test_ablation_keeps_seeds_apart(results: dict[str, Any]) -> None:
    records = depth.ablation_records(results["ablation"]["preskip"], "preskip", "skip")
    assert [row["place"] for row in records if row["layer"] == 7] == pytest.approx([7 - 1 / 6, 7.0, 7 + 1 / 6])
    assert all(row["low"] <= row["difference"] <= row["high"] for row in records)


def test_curves_hold_the_log(rich: Path, results: dict[str, Any]) -> None:
    log = [json.loads(line) for line in (rich / "arms/lora/seed-3/train.jsonl").read_text().splitlines()]
    records = training.training_records(load_curves(rich, results))
    curve = [row for row in records if (row["arm"], row["seed"]) == ("lora", "3")]
    assert [(row["step"], row["loss"]) for row in curve] == [(line["step"], round(line["loss"], 5)) for line in log]


def test_smoothing_is_unbiased_and_skips_gaps() -> None:
    assert training.smoothed([2.0] * 5) == pytest.approx([2.0] * 5)
    # keep = 0.8: (0.8·0.2·1 + 0.2·3) / (0.8·0.2 + 0.2)
    assert training.smoothed([1.0, 3.0]) == pytest.approx([1.0, 0.76 / 0.36])
    assert training.smoothed([None, 1.0, None]) == [None, pytest.approx(1.0), pytest.approx(1.0)]
