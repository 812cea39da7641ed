"""A run that is finished where other things are installed, or with other processes, than where it began."""

import shutil
from contextlib import contextmanager

import pytest

from preskip.errors import PreskipError
from preskip.experiment import execute
from preskip.experiment.cell import opened
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.experiment.run import finish_run, start_run
from preskip.runs import environment
from preskip.runs.declaration import changes
from tiny_model import write_corpus


@pytest.fixture
def config(tmp_path):
    corpus = write_corpus(tmp_path / "records.jsonl", documents=24)
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return PretrainConfig(
        corpus=str(corpus),
        overrides={**shape, "intermediate_size": 64},
        vocab_size=300,
        seq_len=16,
        batch_size=4,
        tokens=256,
        arms=("base", "preskip"),
        seeds=(1,),
        heldout_fraction=0.3,
        eval_blocks=4,
        eval_documents=5,
        eval_words=40,
        device="cpu",
        dtype="float32",
        peak_flops=1e9,
    )


def test_a_run_goes_on_without_a_tracker_that_is_missing(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("preskip.train.scratch.find_spec", lambda name: object())
    run = start_run(config, tmp_path / "run", ["test"])
    assert run.manifest["config"]["report_to"] == ["tensorboard"]
    monkeypatch.setattr("preskip.train.scratch.find_spec", lambda name: None)
    finish_run(run)
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("not reported to tensorboard, unavailable here: that changes no result") == 1
    assert run.manifest["status"] == "finished"
    assert run.manifest["config"]["report_to"] == ["tensorboard"]
    assert changes(run.manifest) == []
    assert not list(run.path.rglob("events.*"))
    opened.cache_clear()
    assert opened(run.path).config.report_to == ("none",)
    finish_run(run, quiet=True)
    assert capsys.readouterr().err == ""
    with pytest.raises(PreskipError, match="pip install tensorboard"):
        start_run(PretrainConfig.from_json(run.manifest["config"]), tmp_path / "new", ["test"])


def test_a_run_that_goes_on_with_other_workers_says_that_the_threads_have_changed(
    config, tmp_path, monkeypatch, capsys
):
    """Each worker has an equal part of the cores; here the workers are this process."""

    @contextmanager
    def here(count):
        yield lambda function, calls, names: ((index, function(*call)) for index, call in enumerate(calls))

    monkeypatch.setattr(execute, "processes", here)
    monkeypatch.setattr(environment, "usable_cores", lambda: 8)
    opened.cache_clear()
    run = start_run(config, tmp_path / "run", ["test"])
    finish_run(run, workers=2)
    assert run.manifest["environment"]["threads"] == 4
    shutil.rmtree(run.cell("base", 1).folder)
    capsys.readouterr()
    finish_run(run, workers=2)
    assert "were computed with" not in capsys.readouterr().err
    shutil.rmtree(run.cell("base", 1).folder)
    finish_run(run, workers=4)
    told = " ".join(capsys.readouterr().err.split())
    assert "parts of this run were computed with threads 4, now 2: last digits may differ" in told
    assert [known["threads"] for known in run.manifest["earlier_environments"]] == [4]
    opened.cache_clear()
