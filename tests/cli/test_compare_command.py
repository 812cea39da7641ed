"""`preskip compare`: one run, several runs, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preskip.cli.combine import draws
from preskip.errors import PreskipError
from preskip.runs.files import read_json, write_json
from preskip.stats import compare as paired
from preskip.stats.combined import combine
from preskip.stats.power import measured_design
from stored_runs import invoke_app, make_items, write_run

DECLARED = [
    {"arm": "preskip", "reference": other, "set": "heldout", "metric": "bits_per_byte"} for other in ("none", "lora")
]


def invoke(*arguments: object) -> str:
    return invoke_app("compare", *arguments)


def arms(offset: int = 0, seeds: tuple[int, ...] = (1, 2), shift: float = -0.02) -> dict[str, dict[int, list[dict]]]:
    return {
        "none": {seeds[0]: make_items(0)},
        "lora": {seed: make_items(10 * seed + offset) for seed in seeds},
        "preskip": {seed: make_items(20 * seed + offset, shift=shift) for seed in seeds},
    }


def test_one_run_gives_every_pair_with_the_declared_family(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", arms(), family={"declared": DECLARED})
    found = json.loads(invoke(run, "--json"))["comparisons"]
    assert len(found) == 3 * 3
    assert [(e["arm"], e["reference"]) for e in found if e["declared"]] == [("preskip", "none"), ("preskip", "lora")]
    by_hand = paired(arms()["preskip"], arms()["none"], arm="preskip", reference="none")
    entry = next(e for e in found if e["declared"])
    assert (entry["difference"], entry["low"], entry["high"]) == tuple(
        by_hand[0][k] for k in ("difference", "low", "high")
    )
    assert entry["p_holm"] >= entry["p_value"]
    text = invoke(run)
    for part in (
        "declared",
        "preskip − none",
        "p (corr.)",
        "exploratory",
        "p (raw)",
        "undecided †",
        "† exploratory:",
        "better",
        "2 seeds: seeds and documents",
        "60 items in 12 clusters",
        "by seed",
        "next seed [95 %]",
        "P(better)",
        "variance %",
    ):
        assert part in text


def test_one_seed_says_items_only(tmp_path: Path) -> None:
    text = invoke(write_run(tmp_path / "run", arms(seeds=(1,))))
    assert "one seed: items only, not training randomness" in text
    assert "one seed: documents only, not training randomness" in text
    assert "p (corr.)" not in text


def test_options_choose_arms_sets_and_margins(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", arms(shift=-0.0001), family={"declared": []})
    options = ("--reference", "none", "--sets", "heldout", "--margin", "heldout.bits_per_byte=0.05", "--json")
    found = json.loads(invoke(run, *options))
    assert [(e["arm"], e["set"], e["margin"]) for e in found["comparisons"]] == [
        ("lora", "heldout", 0.05),
        ("preskip", "heldout", 0.05),
    ]
    assert {e["verdict"] for e in found["comparisons"]} == {"equivalent"}
    assert found["family"]["margins"]["acc"] == 0.01
    (pair, *_) = json.loads(invoke(run, "--arms", "lora,preskip", "--json", "--confidence", "0.8"))["comparisons"]
    assert (pair["arm"], pair["reference"], pair["confidence"]) == ("preskip", "lora", 0.8)


def test_several_runs_compare_arms_of_the_same_name(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", arms())
    second = write_run(tmp_path / "second", arms(offset=5, seeds=(2, 3), shift=-0.05))
    found = json.loads(invoke(first, second, "--sets", "heldout", "--json"))["comparisons"]
    assert [(e["arm"], e["reference"]) for e in found] == [
        ("second:lora", "first:lora"),
        ("second:preskip", "first:preskip"),
    ]
    # Only seed 2 is in both.
    assert {e["seeds"] for e in found} == {1}
    assert found[1]["verdict"] == "better"
    chosen = json.loads(invoke(first, second, "--reference", "first:none", "--arms", "preskip", "--json"))
    assert {(e["arm"], e["seeds"]) for e in chosen["comparisons"]} == {("first:preskip", 2), ("second:preskip", 2)}
    text = invoke(first, second, "--arms", "first:preskip,second:preskip")
    assert "second:preskip − first:preskip" in text


def test_seeds_that_only_one_of_two_runs_has_are_named(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", arms(seeds=(1, 2)))
    second = write_run(tmp_path / "second", arms(offset=5, seeds=(2, 3)))
    told = json.loads(invoke(first, second, "--json"))["notes"]
    assert told == ["lora, preskip: paired on seeds 2; left out are 3 of second and 1 of first"]
    # The untouched model has one cell, which serves every seed.
    assert json.loads(invoke(first, second, "--arms", "preskip", "--reference", "first:none", "--json"))["notes"] == []
    assert json.loads(invoke(first, write_run(tmp_path / "same", arms(offset=5)), "--json"))["notes"] == []


def test_a_pair_of_runs_without_a_common_seed_leaves_the_others(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, arms(5 * n, seeds)) for n, (name, seeds) in enumerate(
        (("first", (1, 2)), ("second", (2, 3)), ("third", (3, 4)))
    )]  # fmt: skip
    options = ("--arms", "lora", "--sets", "heldout", "--json")
    found = json.loads(invoke(*runs, *options))
    pairs = [(entry["arm"], entry["reference"]) for entry in found["comparisons"]]
    assert pairs == [("second:lora", "first:lora"), ("third:lora", "second:lora")]
    lost = "third:lora (seeds 3, 4) and first:lora (seeds 1, 2) have no seed in common: run both with the same --seeds"
    assert f"no comparison of third:lora and first:lora: {lost}" in found["notes"]
    with pytest.raises(PreskipError, match=r"^third:lora .* have no seed in common: run both with the same --seeds$"):
        invoke(runs[0], runs[2], *options)


def test_runs_of_several_models_and_corpora_give_one_estimate(tmp_path: Path) -> None:
    runs = []
    for index, shift in enumerate((-0.02, -0.03, -0.04)):
        runs.append(write_run(tmp_path / f"run-{index}", arms(100 * index, shift=shift), sha256=str(index) * 64))
        described = {"heldout": {"domain": "in", "kind": "document"}, "cloze": {"domain": "out", "kind": "item"}}
        write_json(runs[-1] / "run.json", {**read_json(runs[-1] / "run.json"), "sets": described})
    options = ("--combine", "--arms", "preskip", "--reference", "lora")
    found = json.loads(invoke(*runs, *options, "--json"))["combined"]
    assert [(entry["metric"], entry["role"]) for entry in found] == [
        ("bits_per_byte", "in"),
        ("acc", "out"),
        ("nll", "out"),
    ]
    single = [json.loads(invoke(run, *options[1:], "--json"))["comparisons"][0] for run in runs]
    assert [part["comparison"]["difference"] for part in found[0]["parts"]] == [e["difference"] for e in single]
    errors = []
    for entry in single:
        parts = {name: value or 0.0 for name, value in entry["deviations"].items()}
        errors.append((parts["seed"] ** 2 / 2 + parts["unit"] ** 2 / 12 + parts["residual"] ** 2 / 24) ** 0.5)
    mean = combine([entry["difference"] for entry in single], errors)
    assert (found[0]["value"], found[0]["low"], found[0]["between"]) == (mean.value, mean.low, mean.between)
    text = invoke_app("compare", *runs, *options, columns=80)
    for part in ("preskip − lora: Bits per byte, in-domain", "run-2: heldout", "combined, 3", "one more"):
        assert part in text
    assert "; 2 degrees of freedom" in text
    assert "all runs are of one corpus: the estimate is of no other" in text
    assert max(map(len, text.splitlines())) <= 80
    for arguments, message in (
        ((runs[0],), "needs two runs or more"),
        ((runs[0], runs[0]), "given twice"),
        ((*runs, "--sets", "cloze"), "leave out --sets and --margin"),
    ):
        with pytest.raises(PreskipError, match=message):
            invoke(*arguments, "--combine")


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        ("ab", []),
        ("aa bb", []),
        ("ax ay", ["all runs are of one model: the estimate is of no other"]),
        ("ax ax", ["all runs are of one model and one corpus: the estimate is of no other"]),
        (
            "ax ay bx by",
            [
                "4 runs of 2 models and 2 corpora are not independent draws: the interval is too narrow where models "
                "or corpora differ"
            ],
        ),
    ],
)
def test_what_repeats_among_the_runs_is_told(runs: str, told: list[str]) -> None:
    pairs = runs.split() if " " in runs else list(zip(runs, runs, strict=True))
    facts = [[{"name": name, "sha256": None} for name in pair] for pair in pairs]
    assert draws([{"model": model, "corpus": corpus} for model, corpus in facts]) == told


def test_of_runs_from_scratch_that_read_more_or_less_model_and_corpus_are_the_same() -> None:
    runs = [
        {"kind": "pretrain", **{what: {"name": "a", "sha256": mark} for what in ("model", "corpus")}} for mark in "xy"
    ]
    assert draws(runs) == ["all runs are of one model and one corpus: the estimate is of no other"]


def test_a_run_without_any_spread_is_named(tmp_path: Path) -> None:
    """Where no item of a run differs between its arms, nothing says how sure that is."""
    same = write_run(tmp_path / "same", {name: arms()["lora"] for name in ("preskip", "lora")})
    runs = [write_run(tmp_path / name, arms(index), corpus=name) for index, name in enumerate(("one", "two"))]
    options = ("--combine", "--arms", "preskip", "--reference", "lora")
    assert "same is left out: its difference has no spread" in invoke(same, *runs, *options)
    # Right and wrong answers have limits all the same: of 12 documents, 1 - 0.025^(1/12) to either side.
    for others in (runs, runs[:1]):
        combined = json.loads(invoke(same, *others, *options, "--json"))["combined"]
        found = next(entry for entry in combined if entry["metric"] == "acc")
        assert (len(found["parts"]), found["left_out"]) == (1 + len(others), [])
    other = found["parts"][1]["comparison"]
    errors = [(1 - 0.025 ** (1 / 12)) / 1.959964, measured_design(other).standard_error]
    mean = combine([0.0, other["difference"]], errors)
    assert (found["value"], found["standard_error"]) == pytest.approx((mean.value, mean.standard_error), rel=1e-6)


def test_arms_of_one_name_that_are_not_the_same_are_told(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, arms(index), corpus=name) for index, name in enumerate(("one", "two"))]
    manifest = read_json(runs[1] / "run.json")
    manifest["arms"]["lora"]["description"] = "LoRA elsewhere"
    write_json(runs[1] / "run.json", manifest)
    options = ("--combine", "--reference", "lora", "--json", "--arms")
    told = "lora is not the same in all runs: lora; LoRA elsewhere"
    assert told in json.loads(invoke(*runs, *options, "preskip"))["notes"]
    write_json(runs[1] / "run.json", {**manifest, "kind": "pretrain"})
    with pytest.raises(PreskipError, match="from scratch have no arm in common"):
        invoke(*runs, *options, "preskip")


def test_a_pair_that_runs_store_in_opposite_directions_is_combined(tmp_path: Path) -> None:
    """What one run declared turned round counts as in the first run's direction."""
    turned = {"declared": [{"arm": "lora", "reference": "preskip", "set": "heldout", "metric": "bits_per_byte"}]}
    found = {}
    for name, family in (("alike", {}), ("turned", turned)):
        first = write_run(tmp_path / name / "first", arms())
        second = write_run(tmp_path / name / "second", arms(7, shift=-0.03), family=family)
        found[name] = json.loads(invoke(first, second, "--combine", "--json"))["combined"]
    assert len(found["alike"]) == 3 * 3
    shown = ("arm", "reference", "set", "metric", "difference", "low", "high", "gained", "lost")
    for alike, other in zip(found["alike"], found["turned"], strict=True):
        parts, others = ([part["comparison"] for part in entry.pop("parts")] for entry in (alike, other))
        assert alike == other
        for one, two in zip(parts, others, strict=True):
            assert {key: one[key] for key in shown} == {key: two[key] for key in shown}


def test_unfinished_cells_are_left_out_and_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", arms())
    (run / "arms/lora/seed-2/cell.json").unlink()
    found = json.loads(invoke(run, "--arms", "lora,preskip", "--json"))
    assert found["notes"] == ["run: lora is not finished for seed 2; left out"]
    assert found["comparisons"][0]["seeds"] == 1


def test_seeds_and_arms_without_a_folder_are_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", arms())
    manifest = read_json(run / "run.json")
    manifest |= {"status": "interrupted", "seeds": [1, 2, 3]}
    manifest["arms"]["content"] = manifest["arms"]["lora"]
    write_json(run / "run.json", manifest)
    assert json.loads(invoke(run, "--json"))["notes"] == [
        "run: the run is interrupted; it is compared as far as it is",
        "run: lora is not finished for seed 3; left out",
        "run: preskip is not finished for seed 3; left out",
        "run: content is not finished for seed 1, 2, 3; left out",
    ]


def test_the_shown_level_changes_no_verdict(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", arms(shift=-0.011))
    wide, narrow = (json.loads(invoke(run, "--json", "--confidence", c))["comparisons"] for c in ("0.9999", "0.5"))
    assert [e["verdict"] for e in wide] == [e["verdict"] for e in narrow]
    assert any(e["verdict"] == "better" and e["low"] <= 0 <= e["high"] for e in wide)


def test_a_comma_in_the_name_of_a_run_does_not_separate_arms(tmp_path: Path) -> None:
    runs = write_run(tmp_path / "first", arms()), write_run(tmp_path / "second, ünï", arms())
    entries = json.loads(invoke(*runs, "--arms", "second, ünï:lora,first:lora", "--json"))["comparisons"]
    assert {(entry["arm"], entry["reference"]) for entry in entries} == {("first:lora", "second, ünï:lora")}
    shared = json.loads(invoke(runs[0], "--sets", ",", "--json"))["comparisons"]
    assert shared == json.loads(invoke(runs[0], "--json"))["comparisons"]


def test_what_cannot_be_compared_is_refused_with_one_line(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", arms())
    fewer = {arm: {s: rows[:-1] for s, rows in cells.items()} for arm, cells in arms().items()}
    other_items = write_run(tmp_path / "fewer", fewer)
    other_model = write_run(tmp_path / "model", arms(), sha256="b" * 64)
    tokenizers = []
    for mark in "xy":
        tokenizers.append(write_run(tmp_path / f"tokenizer-{mark}", arms(), sha256=mark * 64))
        record = read_json(tokenizers[-1] / "run.json")
        write_json(tokenizers[-1] / "run.json", {**record, "tokenizer": {"sha256": mark * 64}})
    other_dtype = write_run(tmp_path / "dtype", arms(), dtype="bfloat16")
    other_schema = write_run(tmp_path / "schema", arms())
    write_json(other_schema / "run.json", {**read_json(other_schema / "run.json"), "schema_version": 1})
    other_context = write_run(tmp_path / "context", arms())
    sets = {"heldout": {"kind": "document", "context_length": 256}}
    write_json(other_context / "run.json", {**read_json(other_context / "run.json"), "sets": sets})
    without = [{"set": "cloze", "kind": "item", "id": str(n), "scores": {}} for n in range(9)]
    unscored = write_run(tmp_path / "unscored", {"none": {1: without}, "lora": {1: without}})
    third = write_run(tmp_path / "third", arms())
    write_json(third / "run.json", {**read_json(third / "run.json"), "sets": {"heldout": {"context_length": 512}}})
    tasks = []
    shots = {"prompt_sha256": "p" * 64, "num_fewshot": 5, "sample_seed": 0}
    changed = {
        "data": {"sha256": "b" * 64},
        "prompts": {"lm_eval": {"prompt_sha256": "q" * 64}},
        "as": {},
        "drawn": {"items": 60, "lm_eval": shots | {"examples_drawn": True}},
        "limited": {"items": 50, "lm_eval": shots | {"examples_drawn": True}},
        "whole": {"items": 60, "lm_eval": shots | {"examples_drawn": False}},
        "whole limited": {"items": 50, "lm_eval": shots | {"examples_drawn": False}},
    }
    for name, changes in changed.items():
        tasks.append(write_run(tmp_path / name, arms()))
        described = {
            "kind": "item",
            "domain": "out",
            "sha256": "a" * 64,
            "lm_eval": {"prompt_sha256": "p" * 64},
            **changes,
        }
        write_json(tasks[-1] / "run.json", {**read_json(tasks[-1] / "run.json"), "sets": {"cloze": described}})
    other_data, other_prompts, as_first, drawn, limited, whole, whole_limited = tasks
    elsewhere = write_run(tmp_path / "elsewhere", arms(seeds=(7, 8)))
    cases = [
        ((first, other_items), r"do not share the items of cloze \(59 and 60, 59 shared; not shared: 'doc-11#4'\)"),
        ((first, other_model), r"different base models \(sha256 aaaaaaaaaaaa and bbbbbbbbbbbb\)"),
        (tuple(tokenizers), "tokenizer-x and tokenizer-y have other tokenizers; .* give both the same --tokenizer"),
        ((first, other_dtype), "float32 and float32, dtype:none bfloat16 and bfloat16.*--allow-different-dtype"),
        ((first, other_schema), "schema_version 1, this preskip .* reads"),
        ((other_context, third), "heldout was scored with context length 256 in one run and 512"),
        ((as_first, other_data), "cloze has other data in one run than in another"),
        ((as_first, other_prompts), r"cloze has another prompt sha256 in one run \(pppppppppppp\)"),
        ((drawn, limited), "cloze has other few-shot examples in one run .* with the same --limit"),
        ((first, elsewhere), r"\(seeds 7, 8\) and first:lora \(seeds 1, 2\) have no seed in common"),
        ((first, "--arms", "lroa"), "unknown arm 'lroa': the finished arms are none, lora, preskip"),
        ((first, other_items, "--reference", "none"), "none is in several runs: choose one of first:none, fewer:none"),
        ((first, "--arms", "lora"), "nothing to compare: only lora was chosen"),
        ((first, first), "given twice"),
        ((tmp_path / "no",), "is not a run directory"),
        ((first, "--margin", "acc"), "'acc' is not metric=number"),
        ((first, "--margin", "acc=-1"), "'acc=-1' is no margin: it must be positive"),
        ((first, "--margin", "acc=inf"), "'acc=inf' is not metric=number"),
        ((first, "--margin", "accuracy=0.5"), "--margin accuracy: nothing of that name .* choose among acc, bits_per"),
        ((first, "--sets", "wiki"), "do not share the set 'wiki'"),
        ((unscored,), "^what the arms share holds no score: evaluate them again$"),
        ((first, "--confidence", "95"), "must lie between 0 and 1"),
    ]
    for arguments, message in cases:
        with pytest.raises(PreskipError, match=message) as caught:
            invoke(*arguments)
        assert "\n" not in str(caught.value)
    # The first examples of a task are the same for every item.
    assert "whole limited:lora" in invoke(whole, whole_limited, "--arms", "lora")
    assert "part of a difference may be rounding" in invoke(first, other_dtype, "--allow-different-dtype")


def test_combined_runs_keep_their_notes_and_pairs_that_two_of_them_hold(tmp_path: Path) -> None:
    more = {**arms(), "content": {seed: make_items(30 * seed) for seed in (1, 2)}}
    runs = [write_run(tmp_path / name, cells) for name, cells in (("a", more), ("b", more), ("c", arms()))]
    (runs[0] / "arms/lora/seed-2/cell.json").unlink()
    found = json.loads(invoke(*runs, "--combine", "--arms", "content,lora", "--json"))
    assert found["notes"] == [
        "a: lora is not finished for seed 2; left out",
        "c: content has no finished cell; pairs with it are left out",
        "all runs are of one model and one corpus: the estimate is of no other",
    ]
    assert {tuple(part["run"] for part in entry["parts"]) for entry in found["combined"]} == {("a", "b")}


def test_a_pair_that_cannot_be_combined_is_told_and_leaves_the_others(tmp_path: Path) -> None:
    alike = {"lora": {seed: make_items(10 * seed) for seed in (1, 2)}}
    alike["content"] = alike["lora"]  # the same weights, as it were: no spread
    apart = {"preskip": {seed: make_items(20 * seed, shift=-0.02) for seed in (1, 2)}}
    runs = [write_run(tmp_path / name, {**alike, **apart, "skip": {3: make_items(7)}}) for name in ("a", "b")]
    found = json.loads(invoke(*runs, "--combine", "--json"))
    assert {entry["arm"] for entry in found["combined"] if entry["metric"] == "bits_per_byte"} == {"preskip"}
    told = "content and lora, bits_per_byte, heldout: no spread in a, b; not combined"
    assert told in found["notes"]
    assert sum("have no seed in common" in note for note in found["notes"]) == 2 * 3


def test_runs_of_different_margins_are_judged_by_the_narrowest(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / name, arms(index), family={"margins": {"bits_per_byte": margin}})
        for index, (name, margin) in enumerate((("wide", 0.5), ("narrow", 0.25)))
    ]
    options = ("--combine", "--arms", "preskip", "--reference", "lora")
    for order in (runs, runs[::-1]):
        found = json.loads(invoke(*order, *options, "--json"))["combined"]
        margins = {entry["metric"]: entry["margin"] for entry in found}
        assert margins == {"bits_per_byte": 0.25, "acc": None, "nll": None}
    assert "equivalent within ±0.25, the narrowest margin: p " in invoke_app("compare", *runs, *options)
    same = write_run(tmp_path / "same", arms(5), family={"margins": {"bits_per_byte": 0.5}})
    assert "narrowest" not in invoke_app("compare", runs[0], same, *options)
