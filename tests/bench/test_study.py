"""The study's driver: what is begun is resumed, what is done is left, the deadline interrupts, all is compared."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from preskip.experiment.parse import parse_seeds
from preskip.runs.directory import RunDirectory
from scripts import load_script


@pytest.fixture
def script(tmp_path, monkeypatch):
    module = load_script("study")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return module


class Process:
    """In place of a probe: it finishes its run, unless it is to take longer than is left."""

    endless = False

    def __init__(self, arguments):
        self.arguments = list(map(str, arguments))
        self.signals = []

    def wait(self, timeout=None):
        if self.signals:
            return 130
        given = dict(zip(self.arguments, self.arguments[1:], strict=False))
        if self.arguments[0] == "probe":
            seeds = {"seeds": list(parse_seeds(given["--seeds"]))} if "--seeds" in given else {}
            run = Path(given.get("--out") or given["--resume"])
            if "--out" in given:
                RunDirectory.create(run, {"config": {}})
            if self.endless:
                raise subprocess.TimeoutExpired("probe", timeout)
            record = json.loads((run / "run.json").read_text())
            (run / "run.json").write_text(json.dumps({**record, **seeds, "status": "finished"}))
        return 0

    def terminate(self):
        self.signals.append(signal.SIGTERM)


def run(script, monkeypatch, *arguments):
    started = []

    def start(command):
        started.append(Process(command))
        return started[-1]

    monkeypatch.setattr(script, "preskip", start)
    monkeypatch.setattr(sys, "argv", ["study.py", *map(str, arguments)])
    return script.main(), [process.arguments for process in started], started


def test_every_model_and_corpus_then_one_estimate(script, tmp_path, monkeypatch):
    options = ("--out", tmp_path / "study", "--models", "a,./b.gguf", "--", "--steps", "5")
    code, commands, _ = run(script, monkeypatch, *options)
    names = ["a-wikitext2", "a-books24", "b-wikitext2", "b-books24"]
    runs = [str(tmp_path / "study" / name) for name in names]
    assert code == 0
    assert [command[:6] for command in commands[:2]] == [
        ["probe", "a", "--preset", "confirmatory", "--corpus", corpus] for corpus in ("wikitext2", "books24")
    ]
    assert [command[6:] for command in commands[:4]] == [["--out", path, "--steps", "5"] for path in runs]
    assert commands[4] == ["compare", *runs, "--combine"]
    assert run(script, monkeypatch, *options)[1] == [commands[4]]  # all is done


def test_the_deadline_interrupts_and_the_next_call_resumes(script, tmp_path, monkeypatch):
    monkeypatch.setattr(Process, "endless", True)
    code, commands, started = run(script, monkeypatch, "--out", tmp_path, "--corpora", "wikitext2", "--minutes", "0")
    assert (code, len(commands), started[0].signals) == (3, 1, [signal.SIGTERM])
    assert (tmp_path / "smollm2-wikitext2" / "run.json").is_file()
    monkeypatch.setattr(Process, "endless", False)
    code, commands, _ = run(script, monkeypatch, "--out", tmp_path, "--corpora", "wikitext2", "--", "--steps", "9")
    assert (code, commands) == (0, [["probe", "--resume", str(tmp_path / "smollm2-wikitext2")]])


def test_seeds_are_added_to_what_is_finished(script, tmp_path, monkeypatch):
    options = ("--out", tmp_path, "--corpora", "wikitext2")
    run_of = tmp_path / "smollm2-wikitext2"
    _, commands, _ = run(script, monkeypatch, *options, "--seeds", "1,2,3", "--", "--looks", "3,5")
    assert commands[0][-6:] == ["--out", str(run_of), "--seeds", "1,2,3", "--looks", "3,5"]
    assert run(script, monkeypatch, *options, "--seeds", "1,2,3")[1] == run(script, monkeypatch, *options)[1] == []
    _, commands, _ = run(script, monkeypatch, *options, "--seeds", "1,...,5")
    assert commands == [["probe", "--resume", str(run_of), "--seeds", "1,...,5"]]


def test_seeds_are_added_once_a_run_that_was_interrupted_is_finished(script, tmp_path, monkeypatch):
    run_of = tmp_path / "smollm2-wikitext2"
    RunDirectory.create(run_of, {"config": {}, "seeds": [1, 2, 3]})
    options = ("--out", tmp_path, "--corpora", "wikitext2", "--seeds", "1,...,5")
    resume = ["probe", "--resume", str(run_of)]
    assert run(script, monkeypatch, *options)[1] == [resume, [*resume, "--seeds", "1,...,5"]]
    assert run(script, monkeypatch, *options)[1] == []


def test_two_models_of_one_name_are_refused(script, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(script, monkeypatch, "--out", tmp_path, "--models", "a/m,b/m")
    assert "two of the models or corpora have one name" in capsys.readouterr().err
