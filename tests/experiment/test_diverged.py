"""A cell whose training diverges: the others are computed, the results leave it out and say so, the page stands."""

import json
import re
from contextlib import suppress

import pytest

from conforming import run_faults
from preskip.cli.main import main
from preskip.errors import DivergedError, PreskipError
from preskip.experiment import frozen
from preskip.experiment.run import finish_run, start_run
from preskip.experiment.search import tuning_seed
from small_probe import small_probe
from stored_runs import invoke_app

FAST = {"arms": ("none", "preskip", "lora", "skip"), "lr_mode": "default", "steps": 2, "last_word_items": 0}


@pytest.fixture
def diverging(monkeypatch):
    """Let trainings of these arms and seeds diverge."""
    cells, train = set(), frozen.train_frozen

    def trained(model, blocks, settings, *, arm, **where):
        if (arm, settings.seed) in cells:
            raise DivergedError(f"arm {arm}: the loss is nan")
        return train(model, blocks, settings, arm=arm, **where)

    monkeypatch.setattr(frozen, "train_frozen", trained)
    return cells


def test_a_diverged_cell_is_left_out_with_a_note(tmp_path, diverging, capsys):
    whole = finish_run(start_run(small_probe(tmp_path, **FAST), tmp_path / "whole", ["test"]))
    capsys.readouterr()
    diverging |= {("preskip", 1), ("skip", 1), ("skip", 2)}
    run = start_run(small_probe(tmp_path, **FAST), tmp_path / "run", ["test"])
    results = finish_run(run)
    left = ["no results of preskip, seed 1: arm preskip: the loss is nan"]
    left += [f"no results of skip, seed {seed}: arm skip: the loss is nan" for seed in (1, 2)]
    assert sorted(results["notes"]) == left
    told = capsys.readouterr().err.splitlines()
    assert set(left) <= set(told)
    failed = [line for line in told if re.match(r"cell \d of \d failed: (preskip, seed 1|skip, seed [12])", line)]
    assert len(failed) == 3
    assert (run.manifest["status"], run.manifest["seeds"]) == ("finished", [1, 2])
    assert {arm: own["seeds"] for arm, own in results["arms"].items()} == {"none": [1], "preskip": [2], "lora": [1, 2]}
    assert results["arms"]["lora"]["metrics"] == whole["arms"]["lora"]["metrics"]
    pairs = {(one["arm"], one["reference"]): one["seeds"] for one in results["comparisons"]}
    assert pairs == {("preskip", "lora"): 1, ("preskip", "none"): 1, ("lora", "none"): 2}
    assert run_faults(run.path) == []
    with suppress(SystemExit):
        main(["report", str(run.path)])
    assert "no results of preskip, seed 1" in (run.path / "report.html").read_text()
    # It is tried again on resuming.
    diverging.clear()
    again = finish_run(run)
    assert (again["arms"].keys(), again.get("notes")) == (whole["arms"].keys(), whole.get("notes"))
    assert json.dumps(again["comparisons"]) == json.dumps(whole["comparisons"])


def test_an_arm_without_a_rate_is_left_out_with_a_note(tmp_path, diverging):
    """Of one whose first search finds none all seeds, of a later search that one; hours of the others are not lost."""
    options = {**FAST, "arms": ("none", "preskip", "lora", "skip"), "lr_mode": "tune"}
    run = start_run(small_probe(tmp_path, **options), tmp_path / "run", ["test"])
    first, second = (tuning_seed(small_probe(tmp_path, **options), seed) for seed in (1, 2))
    diverging |= {("skip", first), ("preskip", second)}
    results = finish_run(run, quiet=True)
    assert {arm: own["seeds"] for arm, own in results["arms"].items()} == {"none": [1], "preskip": [1], "lora": [1, 2]}
    assert sorted(results["notes"]) == [
        "no results of preskip, seed 2: training diverged at its best learning rate: give a fixed --lr",
        *(
            f"no results of skip, seed {seed}: training diverged at every learning rate: use --dtype float32 or fixed "
            "--lr"
            for seed in (1, 2)
        ),
    ]
    assert run_faults(run.path) == []
    again = finish_run(run, quiet=True)  # from what was tried, without a training
    assert json.dumps(again) == json.dumps(results)


def test_a_look_that_lacks_a_seed_is_told(tmp_path, diverging):
    diverging.add(("preskip", 1))
    config = small_probe(tmp_path, **FAST | {"arms": ("none", "preskip"), "looks": (2, 3)})
    run = start_run(config, tmp_path / "run", ["test"])
    told = "preskip and none: seed 1 is missing, so the look at 2 seeds is not reached"
    assert told in finish_run(run, quiet=True)["notes"]
    assert told in json.loads(invoke_app("compare", run.path, "--json"))["notes"]


def test_where_everything_diverges_there_are_no_results(tmp_path, diverging):
    diverging |= {(arm, seed) for arm in FAST["arms"] for seed in (1, 2)}
    run = start_run(small_probe(tmp_path, **FAST), tmp_path / "run", ["test"])
    with pytest.raises(PreskipError, match=r"every training diverged \(no results of preskip, seed 1: .*start a new"):
        finish_run(run, quiet=True)
    assert run.manifest["status"] == "diverged"
    assert {"load", "train", "evaluate", "total"} == run.manifest["timings"].keys()
    assert run.cell("none", 1).is_done
    assert not (run.path / "results.json").exists()
