"""How long a run takes: the work by hand, a measured step, and the pace as cells are done."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from preskip.data.corpus import Document
from preskip.evaluate.texts import prepare_texts
from preskip.experiment.cell import opened
from preskip.experiment.outlook import TRAINING, Outlook, measured_token, outlook
from preskip.experiment.run import _say_power, finish_run, start_run
from preskip.metrics import metric_named
from preskip.stats.power import planned_power
from small_probe import small_probe
from tiny_text import PROSE, tiny_tokenizer


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_time_left_is_corrected_by_what_is_done():
    clock = Clock()
    ahead = Outlook({"search": [100.0], "cell": [100.0, 300.0]}, 0.5, clock)
    assert ahead.left() == 250.0
    clock.now = 200.0  # four times as slow as measured
    assert ahead.done("search", 0) == ", about 13 min left"  # 2 s a token, 400 tokens
    assert ahead.left() == 800.0
    clock.now = 300.0
    assert ahead.done("cell", 0) == ", about 8 min left"  # 1.5 s · 300
    assert ahead.done("cell", 1) == ""
    assert ahead.left() == 0.0
    assert Outlook({"cell": [5.0]}, None).left() is None


def test_a_small_first_step_does_not_tell_the_pace():
    """Of workers the first to be done is the untouched model, in whose time their start is."""
    clock = Clock()
    ahead = Outlook({"cell": [4.0, 196.0]}, 0.5, clock)
    clock.now = 60.0
    assert ahead.done("cell", 0) == ", about 2 min left"
    assert Outlook({"cell": [4.0]}, None, clock).left() is None


def test_the_plan_is_said_first_and_measuring_changes_nothing(tmp_path, capsys):
    config = small_probe(tmp_path, last_word_items=0, lr_mode="default")
    run = start_run(config, tmp_path / "run", [])
    finish_run(run)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("[1/3] "))
    said = "\n".join(lines[:first])
    for part in (
        "plan: 3 cells to compute: preskip with 2 seeds; 1 declared comparison",
        "training text ",
        "This run can detect",
        " in all, by one measured step; corrected as cells are done",
    ):
        assert part in said, said
    assert any(line.startswith("[2/3] train preskip seed 1 ...") for line in lines)
    assert any(line.startswith("cell 2 of 3 done: preskip, seed 1, about ") for line in lines)

    prepared = opened(run.path)
    scored = sum(len(window.input_ids) for text in prepared.heldout.texts for window in text.windows)
    ahead = outlook(prepared, [("none", 1), ("preskip", 1)], 1.0)
    training = TRAINING * 3 * 2 * 16
    cells = [scored, scored + training]
    assert ahead.work == {"cell": cells, "search": [], "later search": [], "control": [0.0, 0.0]}

    # A grid of three and four of half the steps, later three; with a limit on harm one more of half the steps.
    scored = prepared.heldout.development_tokens
    for rule, one in (("in-domain", 0), ("frontier", 1)):
        prepared.config = replace(prepared.config, lr_mode="tune", lr_rule=rule)
        work = outlook(prepared, [], 1.0).work
        assert work["search"] == [(3 / 4 + (4 + one) / 2) * training + (7 + one) * scored]
        assert work["later search"] == [(3 + one) / 2 * training + (3 + one) * scored]
    prepared.config = replace(prepared.config, tune_share=1.0)
    assert outlook(prepared, [], 1.0).work["search"] == [(3 / 2 + 5) * training + 8 * scored]
    prepared.config = replace(prepared.config, lr_mode="default", lr_rule="in-domain", tune_share=0.5)

    state, weights = torch.random.get_rng_state(), {k: v.clone() for k, v in prepared.base.state_dict().items()}
    assert 0 < measured_token(prepared, run.manifest) < 1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert prepared.base.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in prepared.base.state_dict().items())
    assert all(parameter.grad is None for parameter in prepared.base.parameters())


def test_a_step_that_cannot_be_measured_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("no room for an estimate")

    monkeypatch.setattr("preskip.experiment.run.measured_token", fails)
    results = finish_run(start_run(small_probe(tmp_path, last_word_items=0, lr_mode="default"), tmp_path / "run", []))
    assert list(results["arms"]) == ["none", "preskip"]
    assert "by one measured step" not in capsys.readouterr().err


def test_documents_of_one_group_can_detect_nothing(capsys):
    documents = [Document(str(number), PROSE[:40], "book") for number in range(40)]
    described = prepare_texts("own", documents, tiny_tokenizer(), context_length=64).describe(
        tiny_tokenizer(), domain="in", title="own", source="here", sha256=None
    )
    one = {"set": "own", "metric": "bits_per_byte", "arm": "preskip", "reference": "none"}
    facts = {"sets": {"own": described}, "seeds": [1, 2, 3], "family": {"declared": [one]}}
    (planned,) = planned_power(facts["sets"], 3, facts["family"])
    assert (planned["units"], planned["decides_none"]) == (1, 0)
    _say_power(facts)
    said = capsys.readouterr().err
    assert "nothing (of 1 independent units no verdict is given) on own" in said
    assert "with 0 to 0 % probability" in said


def test_what_the_first_question_is_decided_with_is_said_before_training(capsys):
    """Against simulated experiments, judged by Student's t with the seeds' degrees of freedom."""
    sets = {"far": {"kind": "document", "documents": 10**6}, "own": {"kind": "document", "documents": 10**6}}
    first, other = (
        {"set": name, "metric": "bits_per_byte", "arm": "preskip", "reference": "lora", "level": level}
        for name, level in (("own", 1), ("far", 2))
    )
    family = {"declared": [first, other], "procedure": "gatekeeping", "margins": {"bits_per_byte": 0.005}}
    _say_power({"sets": sets, "seeds": [1, 2, 3], "family": family})
    said = capsys.readouterr().err
    assert said.count("Its first question, preskip against lora on own, is decided with ") == 1
    spread = metric_named("bits_per_byte").seed_deviation
    drawn = np.random.default_rng(0).standard_normal((20_000, 3)) * spread
    for times, words in ((1, "% if by the margin"), (2, "% if by twice the margin")):
        seen = drawn + times * 0.005
        error = seen.std(axis=1, ddof=1) / 3**0.5
        differs = abs(seen.mean(axis=1)) > error * stats.t.ppf(0.975, 2)
        equal = abs(seen.mean(axis=1)) + error * stats.t.ppf(1 - 0.05 / 2, 2) < 0.005
        share = int(re.search(rf"(\d+) {words}", said)[1])
        assert share == pytest.approx(100 * (differs | equal).mean(), abs=2)


def test_a_set_of_one_item_has_no_outlook_and_ends_nothing(capsys):
    one = {"set": "own", "metric": "acc", "arm": "preskip", "reference": "none"}
    _say_power({"sets": {"own": {"kind": "item", "items": 1}}, "seeds": [1], "family": {"declared": [one]}})
    assert capsys.readouterr().err.startswith("What this run can detect is unknown: 1 units are too few")
