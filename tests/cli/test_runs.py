"""What the commands that make a run share: early ends, and the default folder."""

import errno
import os
import re

import pytest

from preskip.cli.runs import default_out, kept_for_resuming
from preskip.errors import DivergedError, LostWorkersError, PreskipError
from preskip.experiment.execute import processes
from preskip.runs.attempt import attempt, new_run
from preskip.runs.files import clear_disk_errors, write_json


@pytest.fixture
def run(tmp_path):
    return new_run(tmp_path / "run", {"device": "cpu", "dtype": "float32"}, [])


@pytest.mark.parametrize(
    "computed",
    [
        "arms/preskip/seed-1/train.jsonl",
        "search/lora/seed-1/rung-0/0.001/trial.json",
        "search/none.jsonl",
        "controls/dtype-audit.json",
    ],
)
def test_what_was_computed_is_kept_and_the_way_to_finish_it_said(run, computed, capsys):
    (run.path / computed).parent.mkdir(parents=True)
    (run.path / computed).write_text("{}")
    with pytest.raises(PreskipError, match="disk"), kept_for_resuming(run, "probe", is_new=True):
        raise PreskipError("disk full")
    assert (run.path / computed).is_file()
    assert f"preskip probe --resume {run.path}" in capsys.readouterr().err


def test_a_run_that_diverged_is_kept_and_not_to_be_finished(run, capsys):
    write_json(run.path / "arms/none/seed-1/cell.json", {})
    with pytest.raises(DivergedError), kept_for_resuming(run, "probe", is_new=True):
        raise DivergedError("every training diverged: a run keeps its options, start a new one")
    assert run.path.exists()
    assert capsys.readouterr().err == ""


def test_a_new_run_in_which_nothing_was_computed_is_removed(run, capsys):
    with pytest.raises(PreskipError), kept_for_resuming(run, "probe", is_new=True):
        raise PreskipError("no such corpus")
    assert not run.path.exists()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [MemoryError("the base"), OSError(errno.ENOSPC, "No space left on device")])
def test_a_run_that_the_advice_names_is_kept(run, error, capsys):
    """`free some and resume`, `begin a new run with --config RUN/run.json`: as the base loads, as texts are packed."""
    kept = kept_for_resuming(run, "pretrain", is_new=True)
    with pytest.raises(PreskipError, match="free some"), kept, attempt(run), clear_disk_errors(run.path / "data"):
        raise error
    assert (run.path / "run.json").is_file()
    assert f"preskip pretrain --resume {run.path}" in capsys.readouterr().err


def test_a_run_whose_workers_were_lost_is_kept(run, capsys):
    """Each worker holds the base: memory lacks while they load it, before any of them has computed anything."""
    with pytest.raises(LostWorkersError), kept_for_resuming(run, "probe", is_new=True):
        raise LostWorkersError("a worker ended without a word (out of memory?): resume, with fewer --workers")
    assert (run.path / "run.json").is_file()
    assert f"preskip probe --resume {run.path}" in capsys.readouterr().err


def test_a_worker_that_is_killed_is_told_of_by_that_error():
    with pytest.raises(LostWorkersError, match="fewer --workers"), processes(1) as outcomes:
        list(outcomes(os._exit, [(9,)], ["one"]))


def test_an_old_run_is_never_removed(run):
    with pytest.raises(PreskipError), kept_for_resuming(run, "probe", is_new=False):
        raise PreskipError("no such corpus")
    assert run.path.exists()


def test_an_interruption_keeps_the_run(run, capsys):
    with pytest.raises(KeyboardInterrupt), kept_for_resuming(run, "pretrain", is_new=True):
        raise KeyboardInterrupt
    assert run.path.exists()
    assert "preskip pretrain --resume" in capsys.readouterr().err


def test_the_default_folder_names_what_it_is_of():
    folder = default_out("owner/model 1", "texts/my corpus.jsonl")
    assert re.fullmatch(r"runs/\d{8}-\d{6}-model-1-my-corpus", str(folder))
