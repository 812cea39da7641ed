"""The study from scratch: rates are tried until the best has a worse one on either side, then each arm has its own."""

import importlib.util
import signal
import sys
from pathlib import Path

import pytest

from preskip.runs.files import read_json, write_json

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FLAGS = ("--arms", "--out", "--seeds", "--tokens", "--corpus")
# The power of two of 3e-3 at which each arm is best.
BEST = {"base": 0, "canon": 3, "preskip": -1}


@pytest.fixture
def script(monkeypatch):
    pytest.importorskip("altair")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("scratch_study", BENCHMARKS / "scratch_study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return module


@pytest.fixture
def diverging():
    """The rate from which on an arm diverges."""
    return {}


@pytest.fixture
def commands(script, monkeypatch, diverging):
    """What would be run; in place of training each run gets losses that rise with the distance from the best rate."""
    given = []

    def finish(arguments, deadline):
        if deadline is not None:
            return None
        arguments = list(map(str, arguments))
        given.append(arguments)
        value = {name: arguments[arguments.index(name) + 1] for name in FLAGS}
        rates = [arguments[place + 1] for place, word in enumerate(arguments) if word == "--lr"]
        own = dict(rate.split("=") for rate in rates) if "=" in rates[0] else {}
        found = {"schema_version": 2, "arms": {}, "curves": {}, "sets": {"sotu": {"kind": "document"}}}
        for number, arm in enumerate(value["--arms"].split(",")):
            rate = float(own.get(arm, rates[0]))
            if rate >= diverging.get(arm, 1):
                continue
            loss = abs(rate / script.rate_of(BEST[arm]) - 1)
            found["arms"][arm] = {"final_eval_loss": loss, "learning_rate": rate, "tokens": 1000}
            found["arms"][arm] |= {"metrics": {"sotu": {"bits_per_byte": {"value": 2, "low": 1.5, "high": 2.25}}}}
            found["arms"][arm] |= {"parameters": 10 + number, "training_flops": 1e9, "tokens_per_second": 100.0}
            points = {seed: [{"eval_loss": loss + number + float(seed)}] for seed in value["--seeds"].split(",")}
            found["curves"][arm] = points
        Path(value["--out"]).mkdir(parents=True)
        status = "finished" if found["arms"] else "diverged"
        config = {"arms": value["--arms"].split(","), "tokens": int(value["--tokens"]), "corpus": value["--corpus"]}
        write_json(Path(value["--out"]) / "run.json", {"schema_version": 2, "status": status, "config": config})
        if not found["arms"]:
            return 1
        write_json(Path(value["--out"]) / "results.json", found)
        return 0

    monkeypatch.setattr(script, "interruptible", finish)
    monkeypatch.setattr(script, "is_finished", lambda run: (run / "results.json").is_file())
    return given


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["scratch_study.py", *map(str, arguments)])
    return script.main()


def test_every_arm_is_tried_beyond_its_best_and_trained_at_it(script, commands, tmp_path, monkeypatch, capsys):
    pytest.importorskip("vl_convert")
    options = ("--out", tmp_path, "--archs", "tiny", "--arms", ",".join(BEST), "--seeds", "1,2", "--", "--workers", "2",
               "--eval-blocks=512", "--repeat")  # fmt: skip
    assert run(script, monkeypatch, *options) == 0
    *searches, study = commands
    tried = {}
    for command in searches:
        assert command[:5] == ["pretrain", "--arch", "tiny", "--corpus", "books"]
        assert command[command.index("--workers") + 1] == "2"
        assert [word for word in command if word.startswith("--eval-blocks")] == ["--eval-blocks=512"]
        rate = float(command[command.index("--lr") + 1])
        for arm in command[command.index("--arms") + 1].split(","):
            tried.setdefault(arm, set()).add(rate)
        assert command[command.index("--tokens") + 1] == "2000000"
    assert tried == {arm: {script.rate_of(power) for power in powers} for arm, powers in {
        "base": (-1, 0, 1), "canon": (-1, 0, 1, 2, 3, 4), "preskip": (-2, -1, 0, 1)}.items()}  # fmt: skip
    given = [study[place + 1] for place, word in enumerate(study) if word == "--lr"]
    assert given == ["base=0.003", "canon=0.024", "preskip=0.0015"]
    assert study[study.index("--tokens") + 1] == "10000000"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == ["base", "canon", "preskip"]
    # Beside another worker no time is a training's own.
    assert lines[1].endswith("| 0.024 of 0.0015, 0.003, 0.006, 0.012, 0.024, 0.048 | 11 | 1e-06 | – | "
                             "2.5000, 2.0000 to 3.0000 | 2.000 [1.500, 2.250] |")  # fmt: skip
    assert study[study.index("--eval-corpora") + 1] == "sotu:50x400"
    assert study.count("--repeat") == 1
    assert "--primary" not in study  # without base-wide
    assert read_json(tmp_path / "tiny" / "rates.json")["preskip"] == {
        "0.00075": 0.5, "0.0015": 0.0, "0.003": 1.0, "0.006": 3.0}  # fmt: skip
    assert "<svg" in (tmp_path / "tiny" / "loss.svg").read_text()
    before = len(commands)
    assert run(script, monkeypatch, *options) == 0
    assert len(commands) == before  # all is done


def test_a_rate_that_diverges_is_the_worst(script, commands, diverging, tmp_path, monkeypatch, capsys):
    pytest.importorskip("vl_convert")
    # canon alone at 0.024, where it diverges; preskip beside others; base at every rate.
    diverging |= {"base": 0.0, "canon": 0.024, "preskip": 0.003}
    options = ("--out", tmp_path, "--archs", "tiny", "--arms", ",".join(BEST), "--seeds", "1")
    assert run(script, monkeypatch, *options) == 0
    assert [word for word in commands[-1] if "=" in word] == ["canon=0.012", "preskip=0.0015"]
    assert commands[-1][commands[-1].index("--arms") + 1] == "canon,preskip"
    out = capsys.readouterr().out
    rates = ", ".join(f"{script.rate_of(power):g} (diverged)" for power in range(-4, 2))
    assert f"tiny: base is left out, it diverged at every rate that was tried: {rates}\n" in out
    assert "| 0.0015 of 0.00075, 0.0015, 0.003 (diverged), 0.006 (diverged) | " in out
    before = len(commands)
    assert run(script, monkeypatch, *options) == 0
    assert len(commands) == before  # what diverged is not trained again


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arms", "base,canon,preskip"], "rate-0.003 was begun with --arms base,canon, not base,canon,preskip: give"),
        (["--tokens", "5M"], "rate-0.003 was begun with --tokens 2000000, not 1000000: give another --out"),
        (["--corpus", "sotu"], "rate-0.003 was begun with --corpus books, not sotu: give another --out"),
    ],
)
def test_another_study_in_the_same_folder_is_refused(script, commands, tmp_path, monkeypatch, more, message):
    pytest.importorskip("vl_convert")
    options = ("--out", tmp_path, "--archs", "tiny", "--arms", "base,canon", "--seeds", "1")
    assert run(script, monkeypatch, *options) == 0
    before = len(commands)
    with pytest.raises(SystemExit, match=message):
        run(script, monkeypatch, *options, *more)
    assert len(commands) == before


def test_where_every_arm_diverges_the_study_ends(script, commands, diverging, tmp_path, monkeypatch, capsys):
    diverging |= dict.fromkeys(BEST, 0.0)
    assert run(script, monkeypatch, "--out", tmp_path, "--archs", "tiny", "--arms", ",".join(BEST)) == 1
    assert capsys.readouterr().out.count(" is left out, it diverged at every rate") == len(BEST)
    assert not (tmp_path / "tiny" / "study").exists()


def test_the_deadline_leaves_the_rest_for_the_next_call(script, commands, tmp_path, monkeypatch, capsys):
    assert run(script, monkeypatch, "--out", tmp_path, "--archs", "tiny", "--minutes", "0") == script.LEFT_TO_DO
    assert commands == []
    assert "go on with the same command" in capsys.readouterr().out


def test_the_primary_comparison_is_on_text_of_enough_speakers(script, commands, tmp_path, monkeypatch):
    pytest.importorskip("vl_convert")
    monkeypatch.setitem(BEST, "base-wide", 0)
    options = ("--out", tmp_path, "--archs", "tiny", "--seeds", "1", "--arms", "base-wide,preskip")
    assert run(script, monkeypatch, *options) == 0
    *searches, study = commands
    assert study[study.index("--primary") + 1] == "preskip:base-wide:sotu"
    assert not any("--primary" in command for command in searches)  # some of them train other arms alone
