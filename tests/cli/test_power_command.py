"""`preskip power`: planned designs and what a run can resolve."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from cyclopts import ValidationError

from preskip.errors import PreskipError
from preskip.runs.files import read_json, write_json
from preskip.stats import Design, apply_family, measured_power, needed, resolvable
from preskip.stats import compare as paired
from preskip.stats.looks import fractions_of, nominal_levels
from stored_runs import invoke_app, make_items, write_run


def invoke(*arguments: object) -> str:
    return invoke_app("power", *arguments)


def test_the_figures_of_full_lambada_and_of_500_items() -> None:
    for items, expected in ((5153, 0.0123), (500, 0.0397)):
        (row,) = json.loads(invoke("--items", items, "--json"))["designs"]
        assert row["resolvable"] == pytest.approx(expected, abs=5e-5)
    text = invoke("--items", 5153)
    assert re.search(r"Accuracy \(points\) +5,153 +1 +1\.2 ", text)
    assert "one seed: what these trained weights differ by" in text


def test_how_many_items_and_seeds_a_difference_needs() -> None:
    arguments = ("--items", 500, "--seeds", 3, "--difference", 0.03, "--seed-sd", 0.005)
    (row,) = json.loads(invoke(*arguments, "--json"))["designs"]
    enough = ("--seeds", 3, "--seed-sd", 0.005, "--json")
    (found,) = json.loads(invoke("--items", row["needed_units"], *enough))["designs"]
    (short,) = json.loads(invoke("--items", row["needed_units"] - 1, *enough))["designs"]
    assert found["resolvable"] <= 0.03 < short["resolvable"]
    text = invoke(*arguments)
    assert f"{row['needed_units']:,}" in text
    assert "SD over seeds 0.005" in text
    documents = json.loads(invoke("--documents", 50, "--sd", 0.025, "--json"))["designs"][0]
    assert documents["resolvable"] == pytest.approx(0.0101, abs=1e-4)  # 2.86 · 0.025 / √50 with t of 49 degrees


def test_a_run_from_its_measured_spread(tmp_path: Path) -> None:
    family = {"declared": [{"arm": "preskip", "reference": "none", "set": "heldout", "metric": "bits_per_byte"}]}
    cells = {seed: make_items(seed, shift=-0.01 - 0.004 * seed) for seed in (1, 2, 3)}
    base = {1: make_items(9)}
    run = write_run(tmp_path / "run", {"none": base, "preskip": cells}, family=family)
    (row,) = json.loads(invoke(run, "--json"))["designs"]
    entries = apply_family(paired(cells, base, arm="preskip", reference="none"), family)
    assert row["resolvable"] == pytest.approx(measured_power(entries, family)[0]["resolvable"])
    assert (row["observed"], row["basis"]) == (entries[0]["difference"], "measured")
    assert (row["needed_seeds"] <= 3) == (row["resolvable"] <= abs(row["observed"]))
    text = invoke_app("power", run, columns=40)
    for part in ("heldout, bits per byte", "  preskip − none", "found from", "observed", "needs", "seeds"):
        assert part in text  # whole on any terminal
    # Nothing declared: every comparison.
    other = write_run(tmp_path / "other", {"none": base, "preskip": cells})
    assert len(json.loads(invoke(other, "--json", "--difference", 0.01))["designs"]) == 3


def test_documents_of_one_cluster_decide_nothing(tmp_path: Path) -> None:
    cells = {
        arm: {1: [{**record, "cluster": "book"} for record in make_items(seed, shift=shift)]}
        for arm, seed, shift in (("none", 9, 0.0), ("preskip", 1, -0.1))
    }
    run = write_run(tmp_path / "run", cells)
    rows = json.loads(invoke(run, "--json"))["designs"]
    assert {(row["independent_units"], row["decides"], row["decides_none"]) for row in rows} == {(1, 0.0, 0.0)}
    assert all(row["units"] > 6 for row in rows)
    assert "fewer than 6 independent units: no verdict is given, whatever is found" in invoke(run)


def test_bad_input_is_refused_with_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"none": {1: make_items(9)}, "lora": {1: make_items(1)}})
    alone = write_run(tmp_path / "alone", {"none": {1: make_items(9)}})
    cases = [
        ((alone,), "has one finished arm, none, and nothing to compare"),
        ((), "give --items or --documents"),
        (("--items", 5, "--documents", 5), "give --items or --documents"),
        (("--items", 1), "1 units are too few"),
        (("--items", 100, "--seeds", 0), "plan at least 1"),
        (("--items", 100, "--discordant", 10), "discordant 10.0 must be a share"),
        (("--items", 100, "--discordant", 0.2, "--sd", 0.3), "leave it out beside --documents or --sd"),
        (("--documents", 100, "--discordant", 0.2), "leave it out beside --documents or --sd"),
        (("--items", 100, "--power", 80), "power 80.0 must lie between"),
        (("--items", 100, "--family", 0), "family 0"),
        (("--items", 100, "--difference", 0), "difference 0.0"),
        ((run, "--items", 100, "--seeds", 3), "leave out --items, --seeds"),
        ((tmp_path / "no",), "is not a run directory"),
    ]
    for arguments, message in cases:
        with pytest.raises(PreskipError, match=message) as caught:
            invoke(*arguments)
        assert "\n" not in str(caught.value)


def test_a_negative_deviation_is_named() -> None:
    with pytest.raises(ValidationError, match=r'"-1.0" for --sd. -1.0 is not possible: it must be at least 0'):
        invoke("--items", 100, "--sd", -1)


def test_a_design_that_resolves_nothing_says_so() -> None:
    text = invoke("--items", 5, "--seeds", 2, "--seed-sd", 0.5)
    assert re.search(r"Accuracy \(points\) +5 +2 +nothing +nothing ", text)
    assert "fewer than 6 independent units: no verdict is given" in text
    assert "nothing: no difference between two accuracies is large enough" in text


def test_seeds_that_are_needed_are_those_at_the_last_look() -> None:
    """The same comparison held to the level of its first look needs more."""
    run = Path(__file__).parents[2] / "results" / "confirmatory-gemma-3-270m-books24"
    shown = json.loads(invoke_app("power", run, "--difference", 0.003, "--json"))["designs"]
    (row,) = [row for row in shown if (row["reference"], row["set"]) == ("lora", "books24")]
    design = Design(**{key.name: row[key.name] for key in fields(Design)})
    assert row["planned_seeds"] == 5
    assert row["needed_seeds"] == needed(design, 0.003, alpha=0.0475955).seeds == 5
    assert needed(design, 0.003, alpha=0.0076).seeds == 7


def test_planned_looks_end_with_all_seeds_and_have_the_level_of_the_look_that_is_reached() -> None:
    options = ("--documents", 60, "--difference", 0.01, "--looks", "3,5", "--json")
    (last,) = json.loads(invoke(*options))["designs"]
    (first,) = json.loads(invoke(*options, "--seeds", 3))["designs"]
    assert [row["seeds"] for row in (first, last)] == [3, 5]
    names = ("units", "seeds", "unit_deviation", "residual_deviation", "seed_deviation", "unit_freedom")
    for place, row in enumerate((first, last)):
        level = row["looks"][place]["level"]
        design = Design(**{name: row[name] for name in names})
        assert row["resolvable"] == pytest.approx(resolvable(design, alpha=level))
        of_equivalence = nominal_levels(0.05, fractions_of([3, 5]))[place]
        assert row["decides_none"] == pytest.approx(design.decides(0.0, row["margin"], level, of_equivalence))
        # Simulated by look, and computed for each alone.
        decided = sum(look["stops"] for look in row["looks"][: place + 1])
        assert decided == pytest.approx(design.power(0.01, level), abs=0.03)
    assert first["needed_seeds"] == last["needed_seeds"]
    with pytest.raises(PreskipError, match="--seeds gives 4: looks are declared at 3, 5 seeds"):
        invoke(*options, "--seeds", 4)


def test_of_too_few_units_no_look_decides(tmp_path: Path) -> None:
    (planned,) = json.loads(invoke("--documents", 4, "--looks", "3,5", "--difference", 0.1, "--json"))["designs"]
    assert {look["stops"] for look in planned["looks"]} == {0.0}
    records = {seed: [{**r, "cluster": "book"} for r in make_items(seed, shift=-0.1)] for seed in (1, 2, 3)}
    none = [{**record, "cluster": "book"} for record in make_items(0)]
    declared = {"arm": "preskip", "reference": "none", "set": "heldout", "metric": "bits_per_byte", "level": 1}
    family = {"declared": [declared], "procedure": "gatekeeping", "looks": [3, 5]}
    run = write_run(tmp_path / "run", {"none": {1: none}, "preskip": records}, family=family)
    (row,) = json.loads(invoke(run, "--json"))["designs"]
    assert row["decides"] == 0.0
    assert "looks" not in row  # none of them would decide


def test_what_is_missing_of_a_run_is_told_and_ends_nothing(tmp_path: Path) -> None:
    cells = {
        "none": {1: make_items(0)},
        "lora": {seed: make_items(10 * seed) for seed in (1, 2)},
        "preskip": {seed: make_items(20 * seed, shift=-0.02) for seed in (3, 4)},
    }
    run = write_run(tmp_path / "run", cells)
    write_json(run / "run.json", {**read_json(run / "run.json"), "status": "running", "seeds": [1, 2, 3, 4]})
    found = json.loads(invoke(run, "--json"))
    assert {(row["arm"], row["reference"]) for row in found["designs"]} == {("lora", "none"), ("preskip", "none")}
    assert "no comparison of preskip and lora: " in " ".join(found["notes"])
    assert "run: lora is not finished for seed 3, 4; left out" in found["notes"]
    assert "run: the run is running; it is compared as far as it is" in " ".join(invoke(run).split())


def test_where_no_answer_differs_the_figures_are_those_of_the_interval(tmp_path: Path) -> None:
    items = make_items(0)
    run = write_run(tmp_path / "run", {"none": {1: items}, "preskip": dict.fromkeys((1, 2, 3), items)})
    (accuracy,) = [row for row in json.loads(invoke(run, "--json"))["designs"] if row["metric"] == "acc"]
    half = (accuracy["high"] - accuracy["low"]) / 2
    assert accuracy["resolvable"] == accuracy["doubled"] == half > 0.01
    assert (accuracy["verdict"], accuracy["decides_none"]) == ("undecided", 0.0)


def test_an_assumption_that_one_seed_does_not_use_is_refused() -> None:
    for option in ("--shared", "--seed-sd"):
        with pytest.raises(PreskipError, match=f"{option}: with one seed that changes nothing; give --seeds, or a"):
            invoke("--items", 100, option, 0.1)
    assert "SD over seeds 0.005 where there are more than one" in " ".join(invoke("--items", 1500).split())
