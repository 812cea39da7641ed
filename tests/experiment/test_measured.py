"""What fails beside the trainings, one thing at a time or all together, is named, and the rest is as without it."""

import json
import math
from dataclasses import replace

import pytest
import torch

from preskip.errors import DivergedError, PreskipError
from preskip.experiment import controls, frozen
from preskip.experiment.frozen import Frozen
from preskip.experiment.measured import controlled, finite, measured
from preskip.experiment.run import finish_run, start_run
from small_probe import small_probe

NULLS = {"nulls": ("noise", "shuffled"), "equal_step": True, "ablation_documents": 2, "lr_mode": "default"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    arms = ("none", "preskip", "content")
    return small_probe(tmp_path_factory.mktemp("probe"), arms=arms, seeds=(1,), **NULLS)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    run = start_run(config, tmp_path_factory.mktemp("whole") / "run", ["preskip"])
    return finish_run(run, quiet=True)


class Broken:
    size, sets = 0, {}

    def score(self, model, **options):
        raise KeyError("gold")


def test_everything_beside_the_trainings_may_fail(config, whole, tmp_path, monkeypatch):
    errors = {"noise": DivergedError("the loss is NaN"), "shuffled": torch.OutOfMemoryError("no memory left")}
    errors["equal_step"] = RuntimeError("no such kernel")
    fit, profile, prepare = Frozen.fit, frozen.text_profile, frozen.prepare_heldout
    profiles = []

    def failing_fit(self, model, settings, **where):
        name = settings.get("control") or ("equal_step" if settings.get("equal_step") else "")
        if name in errors and (name != "noise" or where["arm"] == "content"):
            raise errors[name]
        return fit(self, model, settings, **where)

    def failing_profile(model, text):
        profiles.append(profile(model, text))
        if len(profiles) == 2:  # of preskip; the first is of the untouched base
            return [{**row, "skip_to_attention": math.nan} for row in profiles[-1]]
        return profiles[-1]

    def failing_ablation(*args, **options):
        raise IndexError("layer 9")

    monkeypatch.setattr(Frozen, "fit", failing_fit)
    monkeypatch.setattr(frozen, "text_profile", failing_profile)
    monkeypatch.setattr(frozen, "ablate", failing_ablation)
    monkeypatch.setattr(frozen, "prepare_heldout", lambda *args: replace(prepare(*args), suite=Broken()))
    run = start_run(config, tmp_path / "run", ["preskip"])
    results = finish_run(run, quiet=True)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert run.manifest["status"] == "finished"
    assert results["notes"] == [
        "none seed 1: no tasks: 'gold'",
        "preskip seed 1: no tasks: 'gold'",
        "preskip seed 1: no depth profile: it holds NaN or infinity: try --dtype float32",
        "content seed 1: no tasks: 'gold'",
        "content seed 1: no ablation: layer 9",
        "no noise null of content, seed 1: the loss is NaN",
        "no shuffled null of preskip, seed 1: no memory left",
        "no control with equal steps of preskip: no such kernel",
    ]
    for arm, facts in whole["arms"].items():
        assert results["arms"][arm]["metrics"] == facts["metrics"]
    assert results["comparisons"] == whole["comparisons"]
    assert results["depth"] == {"content": whole["depth"]["content"]}
    assert results["nulls"] == {"noise": {"preskip": whole["nulls"]["noise"]["preskip"]}, "shuffled": {}}
    assert "equal_step" not in results
    assert whole.keys() - results.keys() == {"equal_step", "ablation"}
    # What failed is tried again on resuming.
    monkeypatch.setattr(Frozen, "fit", fit)
    again = finish_run(run, quiet=True)
    assert (again["nulls"], again["equal_step"]) == (whole["nulls"], whole["equal_step"])


def test_an_audit_that_fails_is_noted(config, monkeypatch, tmp_path):
    def fails(prepared):
        raise PreskipError("no bfloat16")

    monkeypatch.setattr(controls, "_dtype_audit", fails)
    only = replace(config, nulls=(), equal_step=False, dtype_audit=True, arms=("none",))
    results = finish_run(start_run(only, tmp_path / "run", ["preskip"]), quiet=True)
    assert results["notes"] == ["no audit of dtypes: no bfloat16"]
    assert "dtype_audit" not in results


def test_what_ends_an_attempt(monkeypatch):
    notes = []
    cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    for error in (torch.OutOfMemoryError("full"), cpu, MemoryError(), OSError("disk"), KeyboardInterrupt()):
        with pytest.raises(type(error)), measured(notes, "figure"):
            raise error
    with pytest.raises(KeyError), measured(None, "figure"):
        raise KeyError("x")
    monkeypatch.setattr("preskip.experiment.measured.world_size", lambda: 2)
    with pytest.raises(RuntimeError), controlled(notes, "control"):
        raise RuntimeError("the others wait")
    assert notes == []
    with controlled(notes, "control"):
        raise DivergedError("NaN")
    assert notes == ["no control: NaN"]
    assert finite([{"a": 1.0}]) == [{"a": 1.0}]
    with pytest.raises(PreskipError, match="holds NaN or infinity"):
        finite([{"a": [math.inf]}])
