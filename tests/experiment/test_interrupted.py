"""What an attempt that was interrupted leaves: found rates and seconds; and where it cannot go on."""

import pytest
import torch

from preskip.errors import PreskipError
from preskip.experiment import frozen
from preskip.experiment.run import finish_run, start_run
from small_probe import small_probe

FAST = {"steps": 2, "last_word_items": 0}


def test_rates_that_were_found_stay_where_a_later_search_is_interrupted(tmp_path, monkeypatch):
    run = start_run(small_probe(tmp_path, **FAST), tmp_path / "run", ["test"])
    finish_run(run, quiet=True)
    before = run.manifest
    assert before["arms"]["preskip"]["learning_rates"].keys() == {"1", "2"}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("preskip.experiment.run.tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finish_run(run, seeds=(1, 2, 3), quiet=True)
    after = run.manifest
    assert (after["status"], after["finished"], after["config"]["seeds"]) == ("interrupted", None, [1, 2, 3])
    assert after["arms"] == before["arms"]
    assert after["timings"]["total"] > before["timings"]["total"]
    assert after["timings"]["train"] == before["timings"]["train"]


def test_a_run_of_a_gpu_is_refused_where_there_is_none(tmp_path, monkeypatch):
    run = start_run(small_probe(tmp_path, **FAST), tmp_path / "run", ["test"])
    run.update_manifest(config=run.manifest["config"] | {"device": "cuda"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PreskipError, match=r"computed on cuda, and torch sees no CUDA device here: resume it where"):
        finish_run(run, quiet=True)


def test_steps_before_a_resume_count_in_the_seconds_of_a_training(tmp_path, monkeypatch):
    train = frozen.train_frozen

    def resumed(*arguments, **where):
        """As one whose rows are of an earlier attempt."""
        return [{**row, "seconds": 1000.0} for row in train(*arguments, **where)]

    monkeypatch.setattr(frozen, "train_frozen", resumed)
    run = start_run(small_probe(tmp_path, **FAST, lr_mode="default", seeds=(1,)), tmp_path / "run", ["test"])
    finish_run(run, quiet=True)
    assert run.cell("preskip", 1).load()[0]["train_seconds"] == 2000.0
    assert 2000.0 <= run.manifest["timings"]["train"] < 2100.0
