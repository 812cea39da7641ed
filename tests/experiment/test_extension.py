"""Seeds are added to a run: what was there stays to the byte, looks are as declared, and the rest is marked."""

import json
import shutil
from pathlib import Path

import pytest

from conforming import run_faults
from preskip.cli.main import main
from preskip.errors import PreskipError
from preskip.experiment.results import summarise_run
from preskip.experiment.run import finish_run, start_run
from preskip.experiment.search import RULE
from preskip.report import build_report
from preskip.runs.declaration import changes
from preskip.runs.directory import RunDirectory
from scripts import load_script
from small_probe import small_probe, stored
from stored_runs import invoke_app

FAST = {"last_word_items": 0, "steps": 2, "save_steps": 1, "eval_documents": 6}  # of fewer nothing is judged


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("extension")


@pytest.fixture(scope="module")
def first(folder):
    """Two seeds of a probe with tuned rates that declares looks at 2 and 3 seeds."""
    run = start_run(small_probe(folder, looks=(2, 3), **FAST), folder / "first", ["test"])
    finish_run(run)
    return run


@pytest.fixture(scope="module")
def extended(first, folder):
    """The same with a third seed, added."""
    path = shutil.copytree(first.path, folder / "extended")
    finish_run(RunDirectory.open(path), seeds=(1, 2, 3))
    return RunDirectory.open(path)


def files(run):
    return {
        str(path.relative_to(run.path)): path.read_bytes()
        for part in ("arms", "search")
        for path in (run.path / part).rglob("*")
        if path.is_file() and path.name != "README.md"  # the card of an adapter is about the whole run
    }


def test_what_was_there_stays_to_the_byte(first, extended):
    before, after = files(first), files(extended)
    assert {name: after[name] for name in before} == before
    new = {name for name in after if name not in before and "/checkpoints/" not in name}
    assert {name.split("/")[2] for name in new} == {"seed-3"}
    assert {"arms/preskip/seed-3/cell.json", "search/preskip/seed-3/search.json"} <= new
    assert run_faults(extended.path) == []


def test_the_third_seed_is_that_of_a_run_that_has_three_from_the_start(extended, folder):
    whole = start_run(small_probe(folder, looks=(2, 3), **FAST, seeds=(1, 2, 3)), folder / "whole", ["test"])
    finish_run(whole)
    own, other = stored(extended.path), stored(whole.path)
    for part in (own, other):  # of two runs that declared other seeds
        for value in part.values():
            (value if isinstance(value, dict) else {}).pop("declaration", None)
    assert own == other


def test_each_seed_trains_at_the_rate_that_was_chosen_for_it(extended):
    results = json.loads((extended.path / "results.json").read_text())
    search = results["search"]["preskip"]
    chosen = {}
    for seed in (1, 2, 3):
        cell = json.loads(extended.cell("preskip", seed).summary.read_text())
        own = json.loads(extended.search_file("preskip", seed).read_text())
        last = [trial for trial in own["trace"] if trial["rung"] == 1]
        assert own["chosen"] == min(last, key=lambda trial: trial["dev"]["in"]["value"])["learning_rate"]
        assert cell["learning_rate"] == own["chosen"] == search["by_seed"][str(seed)]
        assert {trial["for_seed"] for trial in own["trace"]} == {seed}
        assert len({trial["seed"] for trial in own["trace"]}) == 1
        assert (min(trial["rung"] for trial in own["trace"]) == 0) == (seed == 1)
        chosen[str(seed)] = own["chosen"]
    assert extended.manifest["arms"]["preskip"]["learning_rates"] == chosen
    assert len({trial["seed"] for trial in search["trace"]}) == 3


def test_a_planned_look_changes_nothing_that_was_declared(first, extended):
    assert extended.manifest["declaration"] == first.manifest["declaration"]
    (added,) = extended.manifest["extensions"]
    assert (added["before"], added["seeds"], added["planned"]) == ([1, 2], [3], True)
    assert changes(extended.manifest) == []
    (at_two,), (at_three,) = (
        [row for row in json.loads((run.path / "results.json").read_text())["comparisons"] if row["declared"]]
        for run in (first, extended)
    )
    assert (at_two["looked"]["seeds"], at_three["looked"]["seeds"]) == (2, 3)
    assert at_two["looked"]["level"] < at_three["looked"]["level"] < 0.05
    assert at_two["looked"]["p_value"] > at_two["p_value"]
    assert at_three["p_holm"] == at_three["looked"]["p_value"] <= at_two["looked"]["p_value"]
    assert "Looks were declared at 2, 3 seeds" in build_report(extended.path).read_text()


def test_compare_says_the_same_as_the_results(extended):
    found = json.loads(invoke_app("compare", extended.path, "--json"))
    (own,) = [row for row in found["comparisons"] if row["declared"]]
    (kept,) = [
        row for row in json.loads((extended.path / "results.json").read_text())["comparisons"] if row["declared"]
    ]
    assert own == kept
    assert found["notes"] == []


def test_seeds_without_a_look_are_added_and_marked(first, extended, folder, capsys):
    path = shutil.copytree(extended.path, folder / "marked")
    with pytest.raises(SystemExit) as stop:
        main(["probe", "--resume", str(path), "--seeds", "1,...,4"])
    assert stop.value.code == 0
    captured = capsys.readouterr()
    assert "seeds are added without a declared look" in captured.err
    marked = RunDirectory.open(path)
    assert marked.manifest["config"]["seeds"] == marked.manifest["seeds"] == [1, 2, 3, 4]
    (line,) = changes(marked.manifest)
    assert line == (
        "seed 4 added after the results of 3 had been seen, without a declared look: declared comparisons keep the "
        "p-values of the last declared look"
    )
    for shown in (invoke_app("compare", path), (path / "report.html").read_text()):
        assert "after the results of 3 had been seen, without a declared look" in " ".join(shown.split())
    after = files(marked)
    before = files(extended)
    assert {name: after[name] for name in before} == before


def test_an_extension_that_was_interrupted_goes_on(first, extended, folder, monkeypatch):
    from preskip.experiment import search

    path = shutil.copytree(first.path, folder / "interrupted")
    real, calls = search._trial, []

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(search, "_trial", stops)
    with pytest.raises(KeyboardInterrupt):
        finish_run(RunDirectory.open(path), seeds=(1, 2, 3))
    assert RunDirectory.open(path).manifest["status"] == "interrupted"
    monkeypatch.setattr(search, "_trial", real)
    finish_run(RunDirectory.open(path))
    assert stored(path) == stored(extended.path)
    assert len(RunDirectory.open(path).manifest["extensions"]) == 1


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ("2,3", "--seeds leaves out 1"),
        ("1,2,3,3", "different numbers"),
        ("1,2,-3", "a seed must be >= 0"),
        ("1,2,x", "'x' is not a whole number"),
        ("1,...", "needs a last number"),
    ],
)
def test_impossible_seeds_leave_the_run_as_it_was(first, seeds, message, capsys):
    before = (first.path / "run.json").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main(["probe", "--resume", str(first.path), "--seeds", seeds])
    assert stop.value.code == 1
    assert message in capsys.readouterr().err
    assert (first.path / "run.json").read_bytes() == before
    with pytest.raises(SystemExit):
        main(["probe", "--resume", str(first.path), "--seeds", "1,2,3", "--steps", "4"])
    assert "leave out steps" in capsys.readouterr().err


def test_a_number_of_seeds_between_the_looks_is_refused(folder):
    with pytest.raises(PreskipError, match="--seeds gives 2: looks are declared at 3, 5 seeds"):
        small_probe(folder, looks=(3, 5))


def test_another_corpus_is_refused_and_adds_nothing(first, folder):
    path = shutil.copytree(first.path, folder / "other")
    corpus = folder / "corpus.jsonl"
    text = corpus.read_text()
    corpus.write_text(text + json.dumps({"text": "One more document, of a few words."}) + "\n")
    try:
        with pytest.raises(PreskipError, match=r"corpus .* has changed since this run began"):
            finish_run(RunDirectory.open(path), seeds=(1, 2, 3))
    finally:
        corpus.write_text(text)
    manifest = RunDirectory.open(path).manifest
    assert (manifest["config"]["seeds"], "extensions" in manifest) == ([1, 2], False)


def test_a_run_of_an_earlier_preskip_keeps_its_one_search_and_its_family(first, folder):
    """Its search lies where that served all seeds; nothing is declared for it after the fact."""
    path = shutil.copytree(first.path, folder / "old")
    run = RunDirectory.open(path)
    search = json.loads(run.search_file("preskip", 1).read_text())
    search["trace"] = [{key: value for key, value in row.items() if key != "for_seed"} for row in search["trace"]]
    shutil.rmtree(path / "search" / "preskip")
    run.search_file("preskip", None).parent.mkdir()
    run.search_file("preskip", None).write_text(json.dumps(search))
    manifest = json.loads((path / "run.json").read_text())
    del manifest["declaration"]
    for name in ("lr_rule", "lr_harm", "looks", "primary"):
        del manifest["config"][name]
    pairs = [{key: value for key, value in entry.items() if key != "level"} for entry in manifest["family"]["declared"]]
    manifest["family"] = {"declared": pairs, "alpha": 0.05, "margins": {"bits_per_byte": 0.005}}
    (path / "run.json").write_text(json.dumps(manifest))
    shutil.rmtree(run.cell("preskip", 2).folder)
    finish_run(run)
    results = json.loads((path / "results.json").read_text())
    assert results["search"]["preskip"] == search
    assert results["family"] == manifest["family"]
    assert "declaration" not in run.manifest
    assert json.loads(run.cell("preskip", 2).summary.read_text())["learning_rate"] == search["chosen"]
    (entry,) = [row for row in results["comparisons"] if row["declared"]]
    assert entry["p_holm"] == entry["p_value"]
    assert "p_equivalence_holm" not in entry
    assert run_faults(path) == []


@pytest.fixture(scope="module")
def keep():
    """Of benchmarks/keep_run.py, by which results/ is filled."""
    return load_script("keep_run").keep


def test_a_copy_without_weights_says_the_same(extended, keep, folder):
    kept = folder / "kept"
    keep(extended, kept)
    keep(extended, kept)  # replaced
    names = {path.name for path in kept.rglob("*") if path.is_file()}
    assert names == {
        "run.json",
        "results.json",
        "cell.json",
        "items.jsonl.gz",
        "train.jsonl",
        "search.json",
        "trial.json",
    }
    assert run_faults(kept) == []
    assert invoke_app("compare", kept, "--json") == invoke_app("compare", extended.path, "--json")
    manifest = RunDirectory.open(kept).manifest
    assert manifest["directory"] == "."
    assert manifest["model"]["source"] == "local folder " + Path(extended.manifest["model"]["source"]).name
    for place in (extended.path, folder):  # nothing else is replaced
        with pytest.raises(PreskipError, match="is the run itself" if place == extended.path else "is no such copy"):
            keep(extended, place)
    assert (extended.path / "results.json").is_file()
    with pytest.raises(PreskipError, match="is the run itself"):
        keep(RunDirectory.open(kept), folder / "." / "kept")
    assert run_faults(kept) == []
    begun = start_run(small_probe(folder, **FAST), folder / "begun", ["test"])
    with pytest.raises(PreskipError, match="is not finished: finish it with --resume"):
        keep(begun, folder / "none")
    assert not (folder / "none").exists()
    with extended.lock(), pytest.raises(PreskipError, match="another process is working on"):
        keep(RunDirectory.open(extended.path), folder / "none")


def test_what_an_interrupted_run_has_done_is_kept_and_finished_elsewhere(first, extended, keep, folder, monkeypatch):
    from preskip.experiment import run as module

    path = shutil.copytree(first.path, folder / "stopped")

    def stops(prepared, arm, seed):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "run_cell", stops)
        with pytest.raises(KeyboardInterrupt):
            finish_run(RunDirectory.open(path), seeds=(1, 2, 3))
    keep(RunDirectory.open(path), folder / "part", unfinished=True)
    shutil.rmtree(path)
    part = RunDirectory.open(folder / "part")
    assert not list(part.path.rglob("*.safetensors"))
    trials = {trial: trial.read_bytes() for trial in part.path.rglob("trial.json")}
    assert {trial.parts[-4] for trial in trials} == {"seed-1", "seed-2", "seed-3"}
    finish_run(part)
    assert {trial: trial.read_bytes() for trial in part.path.rglob("trial.json")} == trials
    trained = {weights.relative_to(part.path).parts[2] for weights in part.path.rglob("*.safetensors")}
    assert trained == {"seed-3"}
    keep(part, folder / "whole-copy")
    assert run_faults(folder / "whole-copy") == []
    for place in (part.path, folder / "whole-copy"):
        assert invoke_app("compare", place, "--json") == invoke_app("compare", extended.path, "--json")
    with pytest.raises(PreskipError, match=r"part has .*seed-3.*, which .*first lacks: choose another place"):
        keep(first, part.path)
    assert part.cell("preskip", 3).is_done


def test_a_search_that_served_all_seeds_is_kept(keep, folder):
    """As the standard runs of this repository have it."""
    source = shutil.copytree(Path(__file__).parents[2] / "results" / "standard-books", folder / "one-search")
    run = json.loads((source / "run.json").read_text())
    run["command"] += ["--out=/home/somebody/run"]
    (source / "run.json").write_text(json.dumps(run))
    copy = folder / "its-copy"
    keep(RunDirectory.open(source), copy)
    before, after = (
        {str(path.relative_to(top)).removesuffix(".gz") for path in top.rglob("*.json*")} for top in (source, copy)
    )
    assert before == after
    assert "search/preskip/search.json" in after
    assert "--out=runs/its-copy" in json.loads((copy / "run.json").read_text())["command"]


def test_seeds_whose_rates_another_version_has_searched_for_are_told_of(extended, folder):
    """The search of preskip changes, and a run may be years old when seeds are added."""
    path = shutil.copytree(extended.path, folder / "two-rules")
    run = RunDirectory.open(path)
    assert run.manifest["declaration"]["content"]["search_rule"] == RULE

    def notes():
        return [note for note in summarise_run(run).get("notes", ()) if "searched for" in note]

    def change(*seeds):
        for seed in seeds:
            file = run.search_file("preskip", seed)
            search = json.loads(file.read_text())
            del search["rule"]
            file.write_text(json.dumps(search))

    assert notes() == []
    change(1, 2)
    [note] = notes()
    assert "of seed 1, 2 and of seed 3" in note
    change(3)
    [note] = notes()
    assert "another version of preskip than the one that declared the run" in note


def test_a_search_by_another_version_is_told_of_before_anything_is_trained(first, folder, monkeypatch, capsys):
    from preskip.experiment import run as module

    path = shutil.copytree(first.path, folder / "older")
    for file in path.rglob("search.json"):
        search = json.loads(file.read_text())
        del search["rule"]
        file.write_text(json.dumps(search))

    def stops(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "tune", stops)
    told = "learning rates of seed 1, 2 were searched for by another version of preskip, those of seed 3 would be by"
    for run, is_told in ((path, True), (shutil.copytree(first.path, folder / "same"), False)):
        with pytest.raises(KeyboardInterrupt):
            finish_run(RunDirectory.open(run), seeds=(1, 2, 3))
        output = capsys.readouterr()
        assert (told in output.out + output.err) == is_told
