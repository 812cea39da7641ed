"""A probe with reuse of frozen first layers: the search, the weights and the scores of one without."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from preskip.experiment.frozen import Frozen
from preskip.experiment.run import finish_run, start_run
from preskip.train.distributed import Crew
from small_probe import small_probe, stored
from tiny_model import save_tiny_llama

ARMS = ("none", "preskip", "preskip-late", "preskip-late-narrow")
FACTS = {"layers": 3, "training": True, "scoring": True}


def probe(folder, **changes):
    model = folder / "model4"
    if not model.is_dir():
        save_tiny_llama(model, num_hidden_layers=4)
    options = {"model": str(model), "seeds": (1,), "lr_mode": "default", "arms": ARMS}
    return small_probe(folder, **{**options, **changes})


def reused(run):
    """Arms' facts of run.json, and the counts of every cell."""
    facts = {arm: about.get("reuse") for arm, about in run.manifest["arms"].items()}
    return facts, {path.parts[-3]: json.loads(path.read_text()).get("reuse") for path in run.path.rglob("cell.json")}


def without_counts(value):
    """Without what tells of the option itself."""
    if isinstance(value, dict):
        return {key: without_counts(part) for key, part in value.items() if key not in ("reuse", "declaration")}
    return [without_counts(part) for part in value] if isinstance(value, list) else value


def test_search_weights_and_scores_are_those_without(tmp_path):
    tuned = {"arms": ("none", *ARMS[2:]), "lr_mode": "tune", "learning_rates": {"preskip-late-narrow": 1e-3}}
    runs = {on: start_run(probe(tmp_path, **tuned, reuse_prefix=on), tmp_path / str(on), []) for on in (True, False)}
    for run in runs.values():
        finish_run(run, quiet=True)
    with_, plain = (stored(run.path) for run in runs.values())
    assert "search/preskip-late/seed-1/search.json" in plain
    assert without_counts(with_) == without_counts(plain)
    adapters = [path.relative_to(runs[True].path) for path in runs[True].path.rglob("*.safetensors")]
    assert len(adapters) == 2
    assert all((runs[True].path / name).read_bytes() == (runs[False].path / name).read_bytes() for name in adapters)
    facts, counts = reused(runs[True])
    assert facts == {"none": None, "preskip-late": FACTS, "preskip-late-narrow": FACTS}
    assert counts["none"]["passes"] > counts["none"]["reused"] == 0
    # Three steps; the first arm computes them, and both read what the untouched base was scored with.
    assert counts["preskip-late"]["passes"] - counts["preskip-late"]["reused"] >= 3
    assert counts["preskip-late-narrow"]["reused"] == counts["preskip-late-narrow"]["passes"] > 3
    assert set(reused(runs[False])[1].values()) == {None}
    assert not runs[True].prefix.exists()


@pytest.mark.parametrize(
    ("changes", "free", "facts", "said"),
    [
        ({"arms": ARMS[:3]}, None, {**FACTS, "training": False}, ""),  # trained once
        ({"arms": ARMS[:3], "equal_step": True}, None, FACTS, ""),
        ({}, 1000, {**FACTS, "training": False, "scoring": False}, "of states take more than their 0 MiB of disk"),
        ({"steps": 20000}, 6 * 10**8, {**FACTS, "training": False}, "of states take more than their 60 MiB of disk"),
        ({"reuse_prefix": False}, None, None, ""),
        ({"layers": (0, 2, 3), "arms": ("none", "preskip")}, None, None, ""),
    ],
)
def test_what_is_reused_is_settled_before_training(changes, free, facts, said, tmp_path, monkeypatch, capsys):
    if free is not None:
        usage, real = namedtuple("usage", "free"), shutil.disk_usage
        monkeypatch.setattr(
            shutil, "disk_usage", lambda f: usage(free) if Path(f).is_relative_to(tmp_path) else real(f)
        )
    run = start_run(probe(tmp_path, **changes), tmp_path / "run", [])
    prepared, described = Frozen.prepare(run, probe(tmp_path, **changes), False, Crew())
    found = dict(described["arms"][(changes.get("arms") or ARMS)[-1]].get("reuse") or {}) or None
    note = (found or {}).pop("note", "")
    assert (found, said in note, bool(note)) == (facts, True, bool(said))
    assert "reuse" not in described["arms"]["none"]
    lines = " ".join(capsys.readouterr().err.split())
    assert lines.count("the first 3 layers are computed in every pass of") == bool(said)
    assert prepared.reuse.arms.keys() == {arm for arm, about in described["arms"].items() if "reuse" in about}


def test_states_leave_the_disk_that_weights_and_checkpoints_take(tmp_path, monkeypatch):
    free = 700 * 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("usage", "free")(free))
    run = start_run(probe(tmp_path), tmp_path / "run", [])
    prepared, facts = Frozen.prepare(run, probe(tmp_path), True, Crew())
    weights = sum(about["trainable_parameters"] for about in facts["arms"].values())
    # Float32, and a checkpoint of weights, perhaps twice, and the optimiser's two moments.
    largest = max(about["trainable_parameters"] for about in facts["arms"].values())
    assert prepared.reuse._kept.reserve == 512 * 2**20 + 4 * weights + 16 * largest
    assert prepared.reuse.arms["preskip-late"]["scoring"]
    left = prepared.reuse.settled(prepared.heldout, weights=188 * 2**20)["preskip-late"]
    assert not left["scoring"]
    assert "more than their 0 MiB of disk" in left["note"]
