"""The page's first sentence, the arms' diagrams, and that no table or frontier mixes two yardsticks."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from fixture_run import rich_run
from preskip.arms import ARMS
from preskip.experiment.family import declare_family
from preskip.report.comparison_tables import comparison_groups, declared_table, power_table, scoreboard
from preskip.report.diagrams import Diagram, diagram
from preskip.report.lookup import reference_arm, rivals
from preskip.report.search_tables import at_equal_harm, search_table
from preskip.report.words.answer import answer
from preskip.report.words.claims import assess, parts_text
from preskip.report.words.facts import declared_text, facts
from preskip.report.words.frontier import assess_plane
from preskip.report.words.verdicts import p_text
from preskip.stats.verdicts import flipped

ROOT = Path(__file__).parents[2]
SETS = {
    "home": {"domain": "in", "kind": "document", "title": "Home", "primary": "bits_per_byte"},
    "far": {"domain": "out", "kind": "document", "title": "Far", "primary": "bits_per_byte"},
    "farther": {"domain": "out", "kind": "item", "title": "Farther", "primary": "acc"},
}


def entry(name: str, reference: str, verdict: str, **more: Any) -> dict[str, Any]:
    stated = {"difference": -1.0, "low": -2.0, "high": -0.5, "p_value": 0.01, "p_holm": 0.04, "declared": True}
    stated |= {"seeds": 3, "units": 60, "unit": SETS[name]["kind"], "clusters": None}
    metric = SETS[name]["primary"]
    return {"set": name, "metric": metric, "arm": "preskip", "reference": reference, "verdict": verdict} | stated | more


def results(*comparisons: dict[str, Any], **more: Any) -> dict[str, Any]:
    matched = {"budget": "matched", "trainable_parameters": 9, "seeds": [1, 2, 3]}
    arms = {"none": {"budget": "none", "trainable_parameters": 0, "seeds": [1]}, "preskip": matched, "lora": matched}
    return {"sets": SETS, "arms": arms, "comparisons": list(comparisons), **more}


def test_one_sentence_answers() -> None:
    found = results(
        entry("home", "none", "better"),
        entry("home", "lora", "equivalent"),
        *(entry(name, arm, "undecided") for name in ("far", "farther") for arm in ("none", "lora")),
    )
    assert answer(found) == (
        "On its own text (Home) preskip is better than the untouched model and equal within the margin to LoRA of the "
        "same size; elsewhere (Far and Farther) it is undecided against the untouched model and LoRA of the same size, "
        "3 seeds."
    )


def test_the_sentence_says_where_and_what_is_exploratory() -> None:
    found = results(entry("far", "none", "worse"), entry("farther", "none", "better", declared=False))
    for comparison in found["comparisons"]:
        comparison["seeds"] = 1
    assert answer(found) == (
        "Elsewhere (Far and Farther) this training of preskip is worse than the untouched model on Far and better than "
        "the untouched model on Farther (exploratory), 1 seed."
    )
    assert answer(results()) == ""


def test_the_sentence_counts_the_seeds_that_both_arms_have() -> None:
    found = results(entry("home", "none", "better"), entry("home", "lora", "better", seeds=1))
    assert answer(found).endswith("untouched model and better than LoRA of the same size (1 seed), 3 seeds.")
    only = results(entry("home", "lora", "better", seeds=1))
    assert answer(only) == (
        "On its own text (Home) this training of preskip is better than LoRA of the same size, 1 seed."
    )


def test_from_scratch_the_rivals_are_the_plain_controls() -> None:
    stored = json.loads((ROOT / "results/scratch-books/results.json").read_text())
    assert answer(stored) == (
        "On its own text (books) preskip is not judged against the plain architecture, a plain model with as many "
        "weights and a plain model trained with as many FLOPs, from too few documents or clusters; elsewhere (sotu) it "
        "is equal within the margin to the plain architecture and worse than a plain model with as many weights and a "
        "plain model trained with as many FLOPs, 3 seeds."
    )


@pytest.mark.parametrize(
    ("arm", "settings", "shown"),
    [
        ("preskip", {"preprojection": True, "content_skip": True, "enrich_attention": True}, "before skip"),
        ("content", {"preprojection": True, "content_skip": True, "enrich_attention": False}, "beside skip"),
        ("parallel", {"preprojection": True, "content_skip": False, "enrich_attention": False}, "beside skip"),
        ("preproj", {"preprojection": True, "content_skip": False, "enrich_attention": True}, "before"),
        ("skip", {"preprojection": False, "content_skip": True, "enrich_attention": True}, "skip"),
        ("lora", {"r": 8}, "lora"),
        ("layernorm", {}, "norms"),
        ("preskip", {}, "before skip"),  # from scratch no settings are stored
        ("base-wide", {}, ""),
    ],
)
def test_a_diagram_shows_what_an_arm_adds(arm: str, settings: dict[str, Any], shown: str) -> None:
    assert diagram(arm, settings) == Diagram(**{part: part in shown.split() for part in Diagram._fields})


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    run = rich_run(tmp_path_factory.mktemp("rich") / "run", steps=1)
    return json.loads((run / "run.json").read_text()), json.loads((run / "results.json").read_text())


def test_limits_adjusted_for_looks_stand_below_the_plain_ones_and_equivalence_is_corrected_where_it_was() -> None:
    looked = {"seeds": 3, "level": 0.008, "low": -3.0, "high": 0.5, "p_value": 0.04, "p_equivalence": 0.3}
    found = results(
        entry("home", "none", "better", margin=0.005, p_equivalence=0.2, p_equivalence_holm=0.6, looked=looked),
        entry("home", "lora", "better", margin=0.005, p_equivalence=0.2, declared=False, p_holm=None),
    )
    (group,) = comparison_groups(found)
    declared, others = group["declared"], group["others"]
    for table in (declared, declared_table(found)):
        (row,) = table.rows
        place = [column.title for column in table.columns].index("Interval")
        assert (row[place].text, row[place].note) == ("[−2.000, −0.500]", "[−3.000, +0.500] for looks")
    for table, p, note in (
        (declared, "0.6", "p equivalent, corrected"),
        (others, "0.2", "p equivalent, not corrected"),
    ):
        place = [column.title for column in table.columns].index("Margin")
        assert table.columns[place].note == note
        assert table.rows[0][place].note.startswith(p)


@pytest.mark.parametrize(("within", "said"), [(True, "yes"), (False, "not for every seed: the least harm there")])
def test_a_rate_that_does_more_harm_than_was_allowed_is_said(*, within: bool, said: str) -> None:
    search = {"default": 1e-3, "chosen": 1e-3, "extended": False, "trace": []}
    heading = "Within the harm allowed"
    table = search_table({"search": {"lora": {**search, "within_harm": within}}})
    assert table.rows[0][[column.title for column in table.columns].index(heading)].text == said
    assert heading not in {column.title for column in search_table({"search": {"lora": search}}).columns}


def test_no_table_mixes_corrected_and_raw_p(rich: tuple[dict[str, Any], dict[str, Any]]) -> None:
    _, stored = rich
    declared = [e for e in stored["comparisons"] if e["declared"]]
    groups = comparison_groups(stored)
    corrected = [declared_table(stored), *(group["declared"] for group in groups)]
    raw = [power_table(stored), *(group["others"] for group in groups)]
    for tables, note in ((corrected, "corrected"), (raw, "not corrected")):
        for table in tables:
            assert [column.note for column in table.columns if column.title == "p"] == [note]
    # Every p stands where its kind does: of declared ones the raw p, too, beside what they resolve.
    place = [column.title for column in corrected[0].columns].index("p")
    assert [row[place].text for row in corrected[0].rows] == [p_text(e["p_holm"]) for e in declared]
    place = [column.title for column in raw[0].columns].index("p")
    assert [row[place].text for row in raw[0].rows] == [p_text(e["p_value"]) for e in declared]
    badges = [(cell.exploratory, table in raw) for table in corrected + raw for row in table.rows for cell in row
              if cell.badge]  # fmt: skip
    assert set(badges) == {(False, False), (True, True)}
    cells = list(chain.from_iterable(row["cells"] for row in scoreboard(stored)["rows"]))
    assert sum(cell is not None for cell in cells) == sum(
        not e["declared"] and e["reference"] == "none" and e["metric"] == stored["sets"][e["set"]]["primary"]
        for e in stored["comparisons"]
    )


def test_a_frontier_has_one_yardstick() -> None:
    """Raw p 0.01 decides on the frontier, whatever Holm's 0.2 left undecided in the declared family."""
    declared = [entry(name, "lora", "undecided", p_holm=0.2) for name in ("home", "far")]
    exploratory = [entry(name, "none", "better", p_holm=None, declared=False) for name in ("home", "far")]
    plane = assess_plane(results(*declared, *exploratory), "home", "far")
    assert plane["on"] == ["preskip"]
    assert list(plane["dominated"]) == ["none", "lora"]
    blunt = [{**e, "p_value": 0.06} for e in declared]
    assert assess_plane(results(*blunt, *exploratory), "home", "far")["on"] == ["preskip", "lora"]
    equal = {"p_value": 0.4, "p_equivalence": 0.02, "p_equivalence_holm": 0.16}
    alike = [declared[0], {**declared[1], **equal}]
    assert list(assess_plane(results(*alike, *exploratory), "home", "far")["dominated"]) == ["none", "lora"]


def test_what_was_declared_and_not_measured_is_counted() -> None:
    declared = [{"arm": "preskip", "reference": rival, "set": "home"} for rival in ("none", "lora", "parallel")]
    found = results(entry("home", "none", "better"), entry("home", "lora", "undecided"), family={"declared": declared})
    assert declared_text(found).startswith(
        "Of 3 comparisons declared before training, corrected for their number, 1 is decided and 1 undecided; 1 is not "
        "measured. "
    )


@pytest.mark.parametrize(
    ("options", "when"),
    [
        ({}, "half of the steps: after all of them it may be more"),  # of a run from before the option
        ({"tune_share": 0.75}, "75% of the steps: after all of them it may be more"),
        ({"tune_share": 1.0}, "all steps"),
    ],
)
def test_a_limit_on_harm_says_when_it_was_kept(rich: tuple[Any, dict[str, Any]], options: Any, when: str) -> None:
    record, _ = rich
    config = {key: value for key, value in record["config"].items() if key != "tune_share"}
    record = {**record, "config": {**config, "lr_mode": "tune", "lr_rule": "frontier", "lr_harm": 0.01, **options}}
    rule = dict(dict(facts(record))["Run"])["Learning rates"]
    assert rule.endswith(f"loses at most 0.01 bits per byte out-of-domain, on development texts after {when}")


def test_a_claim_counts_its_parts_by_kind(rich: tuple[dict[str, Any], dict[str, Any]]) -> None:
    record, stored = rich
    for claim in assess(record, stored):
        entries = [part["entry"] for part in claim["parts"] if "entry" in part]
        rests_on_trends = claim["id"] == "depth" and claim["verdict"] != "not measured"
        assert claim["exploratory"] == (rests_on_trends or any(not e["declared"] for e in entries))
    parts = [{"verdict": word, "entry": {"declared": kind}} for word, kind in (("supported", True), ("mixed", False))]
    parts += [parts[0], {"verdict": "undecided"}]
    assert parts_text({"parts": parts}) == "declared: 2 supported; exploratory: 1 mixed; 1 undecided"


def test_the_page_is_about_the_first_declared_comparison():
    run = json.loads((ROOT / "results/confirmatory-smollm2-wikitext2/results.json").read_text())
    assert reference_arm(run) == "content"
    assert rivals(run) == ["none", "lora", "lora-attention"]
    assert answer(run).startswith("On its own text (wikitext2) content is better than the untouched model, LoRA")
    assert "elsewhere (books24) it is worse than the untouched model, LoRA of the same size and" in answer(run)
    assert at_equal_harm(run, 0.01)[0] == "lora"
    # As `--primary content:parallel` and `none:content` declare it, and as a run before levels did.
    sets, arms = run["sets"], [ARMS[name] for name in run["arms"]]
    run["family"] = declare_family(arms, sets, ("content", "parallel"))
    assert run["family"]["declared"][0]["reference"] == "none"
    assert rivals(run) == ["none", "parallel", "lora", "lora-attention"]
    assert "better than the untouched model, parallel, LoRA" in answer(run).partition(";")[0]
    assert at_equal_harm(run, 0.01)[0] == "parallel"
    run["family"] = declare_family(arms, sets, ("none", "content"))
    assert (reference_arm(run), rivals(run)) == ("preskip", ["none", "lora", "lora-attention"])
    run["family"] = {"declared": [{"arm": "content", "reference": "skip"}, {"arm": "content", "reference": "full"}]}
    assert rivals(run) == ["none", "skip", "lora", "lora-attention"]


def test_a_turned_comparison_turns_what_its_last_look_says():
    looked = {"seeds": 3, "level": 0.02, "low": -2.0, "high": -0.25, "p_value": 0.01, "p_equivalence": None}
    assert flipped(entry("home", "lora", "better", looked=looked))["looked"] == {**looked, "low": 0.25, "high": 2.0}
