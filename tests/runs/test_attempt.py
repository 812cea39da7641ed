"""One attempt at a run: status as it ends, the lock, inputs and environment that changed."""

import pytest
import torch

from preskip.errors import DivergedError, PreskipError
from preskip.runs.attempt import attempt, check_same_inputs, new_run, note_other_environments
from preskip.version import __version__


@pytest.fixture
def run(tmp_path):
    return new_run(tmp_path / "run", {"device": "cpu", "dtype": "float32"}, ["preskip"], kind="pretrain")


def test_a_new_run_is_recorded_and_never_overwritten(run):
    assert (run.manifest["kind"], run.manifest["status"], run.manifest["command"]) == (
        "pretrain",
        "running",
        ["preskip"],
    )
    with pytest.raises(PreskipError, match="exists already"):
        new_run(run.path, {"device": "cpu", "dtype": "float32"}, [])


@pytest.mark.parametrize(
    ("error", "seen", "status"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, "interrupted"),
        (PreskipError("no"), PreskipError, "failed"),
        (DivergedError("nan"), DivergedError, "diverged"),
        (torch.OutOfMemoryError("10 GiB\nmore"), PreskipError, "failed"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), PreskipError, "failed"),
        (RuntimeError("another"), RuntimeError, "failed"),
    ],
)
def test_how_it_ended_is_recorded_and_the_lock_is_free(run, error, seen, status):
    with pytest.raises(seen) as caught, attempt(run):
        raise error
    assert run.manifest["status"] == status
    assert "\n" not in str(caught.value)
    with attempt(run):
        pass


def test_a_finished_run_stays_finished_where_nothing_was_begun(run):
    def refused(**changes):
        with attempt(run):
            run.update_manifest(**changes)
            raise PreskipError("no")

    run.update_manifest(status="finished")
    with pytest.raises(PreskipError):
        refused()
    assert run.manifest["status"] == "finished"
    with pytest.raises(PreskipError):
        refused(status="running")
    assert run.manifest["status"] == "failed"


def test_a_run_that_goes_on_has_no_time_at_which_it_was_finished(run):
    with attempt(run) as now:
        now.finish({"arms": {"a": {"peak_memory_bytes": 3}}})
    ended = run.manifest["finished"]
    run.update_manifest(seeds=[1, 2])
    assert ended == run.manifest["finished"] is not None
    run.update_manifest(status="running")
    with pytest.raises(KeyboardInterrupt), attempt(run):
        raise KeyboardInterrupt
    assert (run.manifest["status"], run.manifest["finished"]) == ("interrupted", None)


def test_seconds_add_up_over_attempts(run):
    for _ in range(2):
        with attempt(run) as now:
            now.seconds["train"] = 1.5
            now.finish({"arms": {"a": {"peak_memory_bytes": 3}, "b": {"peak_memory_bytes": 7}}})
    assert run.manifest["timings"]["train"] == 3.0
    assert (run.manifest["status"], run.manifest["peak_memory_bytes"]) == ("finished", 7)


def test_seconds_of_an_attempt_that_ends_early_count_once(run):
    def interrupted():
        with attempt(run) as now:
            now.seconds["train"] = 1.5
            with now.stage("tune"):
                now.started -= 20
                raise KeyboardInterrupt

    for times in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        timings = run.manifest["timings"]
        assert timings == pytest.approx({"train": 1.5 * times, "tune": 20.0 * times, "total": 20.0 * times}, rel=0.1)
    with attempt(run) as now:
        now.seconds["train"] = 1.0
        now.finish({"arms": {"a": {"peak_memory_bytes": 3}}})
    timings = run.manifest["timings"]
    assert timings == pytest.approx({"train": 4.0, "tune": 40.0, "total": 40.0}, rel=0.1)
    with pytest.raises(PreskipError), attempt(run):
        raise PreskipError("nothing was begun")
    assert run.manifest["timings"] == timings


def test_the_error_of_an_attempt_matters_more_than_its_record(run, monkeypatch):
    def full(*_, **__):
        raise OSError("no space")

    monkeypatch.setattr("preskip.runs.directory.write_json", full)
    with pytest.raises(KeyError, match="first"), attempt(run):
        raise KeyError("first")


def test_changed_inputs_are_refused(run):
    facts = {"model": {"name": "m", "sha256": "a" * 64}, "sets": {"books": {"sha256": "b"}}}
    check_same_inputs(run, facts)
    run.update_manifest(**facts)
    check_same_inputs(run, facts)
    with pytest.raises(PreskipError, match="model m has changed since"):
        check_same_inputs(run, facts | {"model": {"name": "m", "sha256": "c"}})
    with pytest.raises(PreskipError, match="evaluation set books have changed"):
        check_same_inputs(run, facts | {"sets": {}})
    run.update_manifest(sets={"books": {"sha256": "b", "bytes": 3}})
    check_same_inputs(run, facts | {"sets": {"books": {"sha256": "b", "bytes": 3}}})
    with pytest.raises(PreskipError, match="other documents of books are held out than when this run began"):
        check_same_inputs(run, facts | {"sets": {"books": {"sha256": "b", "bytes": 4}}})
    check_same_inputs(run, facts | {"sets": {"books": {"sha256": "b", "bytes": 4}}}, is_complete=True)
    task = {"sha256": "b", "lm_eval": {"version": 1, "prompt_sha256": "p"}}
    run.update_manifest(sets={"arc_easy": task})
    check_same_inputs(run, facts | {"sets": {"arc_easy": task}})
    other = task | {"lm_eval": {"version": 1, "prompt_sha256": "q"}}
    with pytest.raises(PreskipError, match="lm-eval builds different prompts for arc_easy than when this run began"):
        check_same_inputs(run, facts | {"sets": {"arc_easy": other}})
    # Of other data all may differ; lm-eval is not to blame.
    with pytest.raises(PreskipError, match=r"evaluation set arc_easy have changed .* PRESKIP_DATA as it was"):
        check_same_inputs(run, facts | {"sets": {"arc_easy": other | {"sha256": "c"}}})


def test_a_run_whose_blocks_lacked_the_start_token_is_refused(run):
    old = {"source": "t", "vocab_size": 5, "sha256": "a"}
    run.update_manifest(tokenizer=old)
    check_same_inputs(run, {"tokenizer": old | {"opening": None}, "sets": {}})
    facts = {"tokenizer": old | {"opening": 2}, "sets": {}}
    check_same_inputs(run, facts, is_complete=True)
    with pytest.raises(PreskipError, match="left the start token out of the blocks it trains on"):
        check_same_inputs(run, facts)
    run.update_manifest(**facts)
    check_same_inputs(run, facts)


def test_another_revision_of_a_model_on_the_hub_is_refused(run):
    facts = {"model": {"name": "o/m", "sha256": None, "revision": "a" * 40}, "sets": {}}
    run.update_manifest(**facts)
    check_same_inputs(run, facts)
    with pytest.raises(
        PreskipError, match=r"model o/m has changed since this run began \(its revision was aaaaaaaaaaaa"
    ):
        check_same_inputs(run, facts | {"model": {"name": "o/m", "sha256": None, "revision": "b" * 40}})


def test_an_arm_that_another_preskip_trains_otherwise_is_refused(run):
    arms = {"none": {"learning_rate": None}, "lora": {"learning_rate": 1e-3, "trainable_parameters": 64}}
    facts = {"arms": arms, "sets": {}}
    run.update_manifest(**facts)
    check_same_inputs(run, facts)
    faster = facts | {"arms": {**arms, "lora": {"learning_rate": 2e-3, "trainable_parameters": 64}}}
    with pytest.raises(PreskipError, match=r"arm lora had learning rate 0\.001 when this run began, and has 0\.002 in"):
        check_same_inputs(run, faster)
    larger = facts | {"arms": {**arms, "lora": {"learning_rate": 1e-3, "trainable_parameters": 65}}}
    with pytest.raises(PreskipError, match="arm lora had trainable parameters 64"):
        check_same_inputs(run, larger)
    run.update_manifest(config={**run.manifest["config"], "lr_mode": "tune"})  # the stored rate was searched for
    check_same_inputs(run, faster)
    with pytest.raises(PreskipError, match="arm lora had trainable parameters 64"):
        check_same_inputs(run, larger)


def test_an_architecture_of_another_size_is_refused(run):
    facts = {"arms": {"base": {"learning_rate": 1e-3, "parameters": 64}}, "sets": {}}
    run.update_manifest(**facts)
    check_same_inputs(run, facts)
    with pytest.raises(PreskipError, match=r"arm base had parameters 64 .* has 65 .* put the old --arch file back"):
        check_same_inputs(run, {"arms": {"base": {"learning_rate": 1e-3, "parameters": 65}}, "sets": {}})


def test_another_preskip_is_told(run, capsys):
    """Of a run of before it was recorded with the environment, too."""
    run.update_manifest(environment={"torch": "2.13.0"})
    now = {"torch": "2.13.0", "preskip": "9.9"}
    noted = note_other_environments(run, now, quiet=False)
    assert f"were computed with preskip {__version__}, now 9.9: last digits" in capsys.readouterr().err
    assert noted == {"earlier_environments": [{"torch": "2.13.0", "preskip": __version__}]}
    run.update_manifest(environment=now, **noted)
    assert note_other_environments(run, {**now, "preskip": "10.0"}, quiet=True)["earlier_environments"] == [
        {"torch": "2.13.0", "preskip": __version__},
        now,
    ]


def test_another_environment_is_told_and_kept(run, capsys):
    before = {"torch": "2.12.0", "threads": 1, "processor": "x", "memory_bytes": 3}
    assert note_other_environments(run, before, quiet=False) == {"earlier_environments": []}
    run.update_manifest(environment=before)
    same = note_other_environments(run, {**before, "memory_bytes": 4}, quiet=False)
    assert (same, capsys.readouterr().err) == ({"earlier_environments": []}, "")
    now = {**before, "torch": "2.13.0", "threads": 2}
    noted = note_other_environments(run, now, quiet=False)
    assert capsys.readouterr().err == (
        "parts of this run were computed with torch 2.12.0, now 2.13.0; threads 1, now 2: last digits may differ from "
        "an uninterrupted run\n"
    )
    assert noted == {"earlier_environments": [before]}
    run.update_manifest(environment=now, **noted)
    assert note_other_environments(run, now, quiet=True) == noted
    assert note_other_environments(run, before, quiet=True) == {"earlier_environments": [now]}
    third = {**now, "processor": "y"}
    assert note_other_environments(run, third, quiet=True) == {"earlier_environments": [before, now]}
