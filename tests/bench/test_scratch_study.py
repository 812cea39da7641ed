"""The study from scratch: rates are tried until the best has a worse one on either side, then each arm has its own."""

import math
import signal
import sys
from pathlib import Path

import pytest

from preskip.runs.files import read_json, write_json
from scripts import load_script

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FLAGS = ("--arms", "--out", "--seeds", "--tokens", "--corpus")
# The power of two of 3e-3 at which each arm is best.
BEST = {"base": 0, "canon": 3, "preskip": -1}


@pytest.fixture
def script(monkeypatch):
    pytest.importorskip("altair")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = load_script("scratch_study")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return module


@pytest.fixture
def diverging():
    """The rate from which on an arm diverges."""
    return {}


@pytest.fixture
def killed():
    """Names of runs that are interrupted the first time."""
    return []


@pytest.fixture
def commands(script, monkeypatch, diverging, killed):
    """What would be run; in place of training each run gets losses that rise with the distance from the best rate."""
    given = []

    def begin(arguments):
        value = {name: arguments[arguments.index(name) + 1] for name in FLAGS}
        folder = Path(value["--out"])
        folder.mkdir(parents=True)
        manifest = {"schema_version": 2, "status": "interrupted", "command": ["preskip", *arguments]}
        write_json(folder / "run.json", {**manifest, "seeds": list(map(int, value["--seeds"].split(",")))})
        return folder

    def finish(arguments, deadline):
        if deadline is not None:
            return None
        arguments = list(map(str, arguments))
        given.append(arguments)
        is_resumed = "--resume" in arguments
        folder = Path(arguments[arguments.index("--resume") + 1]) if is_resumed else begin(arguments)
        if folder.name in killed:
            killed.remove(folder.name)
            return None
        manifest = read_json(folder / "run.json")
        if is_resumed and "--seeds" in arguments:
            manifest["seeds"] = list(map(int, arguments[arguments.index("--seeds") + 1].split(",")))
        own = options(manifest["command"])
        rates = dict(rate.split("=") for rate in own["--lr"]) if "=" in own["--lr"][0] else {}
        found = {
            "schema_version": 2,
            "arms": {},
            "curves": {},
            "sets": {"sotu": {"kind": "document"}},
            "comparisons": [],
        }
        for number, arm in enumerate(own["--arms"][0].split(",")):
            rate = float(rates.get(arm, own["--lr"][0]))
            if rate >= diverging.get(arm, 1):
                continue
            loss = abs(rate / script.rate_of(BEST[arm]) - 1)
            found["arms"][arm] = {"final_eval_loss": loss, "learning_rate": rate, "tokens": 1000}
            found["arms"][arm] |= {"metrics": {"sotu": {"bits_per_byte": {"value": 2, "low": 1.5, "high": 2.25}}}}
            # Beside another worker each has half of its speed.
            speed = 50.0 if "--workers" in arguments else 100.0
            found["arms"][arm] |= {"parameters": 10 + number, "training_flops": 1e9, "tokens_per_second": speed}
            found["curves"][arm] = {str(n): [{"eval_loss": loss + number + n}] for n in manifest["seeds"]}
        status = "finished" if found["arms"] else "diverged"
        write_json(folder / "run.json", {**manifest, "status": status})
        if not found["arms"]:
            return 1
        write_json(folder / "results.json", found)
        return 0

    monkeypatch.setattr(script, "interruptible", finish)
    return given


def options(command):
    """The values of every option of a command, in order."""
    found = {}
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word.startswith("--"):
            found.setdefault(word, []).append(following)
    return found


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    return script.main()


def test_every_arm_is_tried_beyond_its_best_and_trained_at_it(script, commands, tmp_path, monkeypatch, capsys):
    pytest.importorskip("vl_convert")
    given = ("--out", tmp_path, "--archs", "tiny", "--arms", ",".join(BEST), "--seeds", "1,2", "--", "--workers", "2",
               "--eval-blocks=512", "--repeat")  # fmt: skip
    assert run(script, monkeypatch, *given) == 0
    *searches, study, speed = commands
    tried = {}
    for command in searches:
        assert command[:5] == ["pretrain", "--arch", "tiny", "--corpus", "books"]
        assert command[command.index("--workers") + 1] == "2"
        assert options(command)["--eval-blocks"] == ["512"]
        rate = float(command[command.index("--lr") + 1])
        for arm in command[command.index("--arms") + 1].split(","):
            tried.setdefault(arm, set()).add(rate)
        assert command[command.index("--tokens") + 1] == "2002000"
    assert tried == {arm: {script.rate_of(power) for power in powers} for arm, powers in {
        "base": (-1, 0, 1), "canon": (-1, 0, 1, 2, 3, 4), "preskip": (-2, -1, 0, 1)}.items()}  # fmt: skip
    chosen = options(study)["--lr"]
    # Half, all and double of the best rate have losses of 0.5, 0 and 1: the parabola is lowest a sixth of one below.
    assert chosen == ["base=0.00267", "canon=0.0214", "preskip=0.00134"]
    assert study[study.index("--tokens") + 1] == "10010000"
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == ["base", "canon", "preskip"]
    # Beside another worker no time is a training's own: it is that of a run alone, of all arms at their rates.
    assert "--workers" not in speed
    assert options(speed)["--lr"] == chosen
    assert (options(speed)["--tokens"], options(speed)["--seeds"]) == (["131072"], ["1,2,3"])
    assert lines[1].endswith("| 0.0214 from 0.0015, 0.003, 0.006, 0.012, 0.024, 0.048 | 11 | 1e-06 | 10 | 2 | "
                             "2.6083, 2.1083 to 3.1083 | 2.000 [1.500, 2.250] |")  # fmt: skip
    assert study[study.index("--eval-corpora") + 1] == "sotu:50x400"
    assert study.count("--repeat") == 1
    assert "--primary" not in study  # without base-wide
    assert read_json(tmp_path / "tiny" / "rates.json")["preskip"] == {
        "0.00075": 0.5, "0.0015": 0.0, "0.003": 1.0, "0.006": 3.0}  # fmt: skip
    assert "<svg" in (tmp_path / "tiny" / "loss.svg").read_text()
    before = len(commands)
    assert run(script, monkeypatch, *given) == 0
    assert len(commands) == before  # all is done


def test_the_report_is_that_of_the_study_and_trains_nothing(script, commands, tmp_path, monkeypatch, capsys):
    pytest.importorskip("vl_convert")
    given = ("--out", tmp_path, "--archs", "tiny", "--arms", ",".join(BEST), "--seeds", "1,2")
    assert run(script, monkeypatch, *given) == 0
    printed = capsys.readouterr().out
    trained = len(commands)
    (tmp_path / "tiny" / "loss.svg").unlink()
    alone = load_script("scratch_report")
    assert run(alone, monkeypatch, tmp_path / "tiny", "--arms", ",".join(BEST)) == 0
    assert capsys.readouterr().out == printed
    assert (tmp_path / "tiny" / "loss.svg").is_file()
    assert len(commands) == trained
    with pytest.raises(SystemExit, match="2"):
        run(alone, monkeypatch, tmp_path / "small")
    assert "small/study is not a directory: give a run directory" in capsys.readouterr().err


def test_a_rate_that_diverges_is_the_worst(script, commands, diverging, tmp_path, monkeypatch, capsys):
    pytest.importorskip("vl_convert")
    # canon alone at 0.024, where it diverges; preskip beside others; base at every rate.
    diverging |= {"base": 0.0, "canon": 0.024, "preskip": 0.003}
    given = ("--out", tmp_path, "--archs", "tiny", "--arms", ",".join(BEST), "--seeds", "1")
    assert run(script, monkeypatch, *given) == 0
    for command in commands[-2:]:
        assert options(command)["--lr"] == ["canon=0.012", "preskip=0.0015"]
        assert options(command)["--arms"] == ["canon,preskip"]
    rates = read_json(tmp_path / "tiny" / "rates.json")
    assert rates["preskip"] == {"0.00075": 0.5, "0.0015": 0.0, "0.003": None, "0.006": None}
    assert set(rates["base"].values()) == {None}
    out = capsys.readouterr().out
    rates = ", ".join(f"{script.rate_of(power):g} (diverged)" for power in range(-4, 2))
    assert f"tiny: base is left out, it diverged at every rate that was tried: {rates}\n" in out
    assert "| 0.0015 from 0.00075, 0.0015, 0.003 (diverged), 0.006 (diverged) | " in out
    before = len(commands)
    assert run(script, monkeypatch, *given) == 0
    assert len(commands) == before  # what diverged is not trained again


def test_the_rate_is_the_lowest_point_of_a_parabola(script):
    exact = {power: 2.0 + 0.3 * (power - 1.2) ** 2 for power in range(-1, 4)}
    assert script.lowest(exact) == pytest.approx(1.2)
    assert script.lowest({0: 2.0, 1: 1.0, 2: math.inf}) == 1
    assert script.lowest({-4: 1.0, -3: 2.0}) == -4  # at the end of what may be tried
    assert script.lowest({0: 1.0, 1: 1.0, 2: 1.0}) == 0
    assert (
        script.lowest({0: 1.0, 1: 1.0, 2: 3.0}) == 0
    )  # of two that are alike the lower, whose other side is not known


def test_what_was_asked_before_training_is_corrected_over_the_peers(script):
    script = load_script("scratch_report")
    assert len(script.QUESTIONS) == 13
    about = {"set": "sotu", "metric": "bits_per_byte", "low": -0.02, "high": -0.001, "seeds": 3, "margin": 0.005}
    about |= {
        "confidence": 0.95,
        "deviations": None,
        "detail": {"by_seed": [], "new_seed": [0, 0], "probability_higher": 0.5},
        "unit": "document",
        "verdict": "undecided",
    }
    rows = [("canon", "base", -0.01, 0.01), ("base", "canon-a", 0.01, 0.03), ("canon", "canon-a", 0.0, 0.001)]
    pairs = [
        {**about, "arm": arm, "reference": reference, "difference": difference, "p_value": p}
        for arm, reference, difference, p in rows
    ]
    losses = {"base": (4.0, 4.1, 4.2), "canon": (3.9, 4.1, 4.0), "canon-a": (4.0,)}
    curves = {arm: {str(seed): [{"eval_loss": loss}] for seed, loss in enumerate(of)} for arm, of in losses.items()}
    results = {"sets": {"sotu": {"kind": "document"}}, "comparisons": pairs, "curves": curves}
    text = script.questions(results, ["base", "canon-a", "canon", "gated-attention"])
    # 0.01 and 0.03 of three: times 3, and times 2; gates diverged, which counts as 1; the third pair is no question.
    cells = [line.split("|") for line in text.splitlines()[2:]]
    # −0.1, 0 and −0.2 have the mean −0.1 and 0.0577 for its error, and t = 4.303; one seed alone tells nothing.
    assert [[row[1], row[4], row[5]] for row in cells] == [
        [" `canon-a` − `base` ", " 0.06 ", " – "],
        [" `canon` − `base` ", " 0.03 ", " −0.100 [−0.348, +0.148] "],
        [" `gated-attention` − `base` ", " 1 ", " – "],
    ]
    assert "p after Holm over 13" in script.questions(results, script.ARMS.split(","))
    assert "−0.010" in text
    assert script.questions({"sets": {"books": {"kind": "document"}}, "comparisons": []}, ["base", "canon"]) == ""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--arms", "base,preskip"], "rate-0.003 was begun with --arms base,canon, not --arms base,preskip: give"),
        (["--tokens", "5M"], "rate-0.003 was begun with --tokens 2002000, not --tokens 1000000: give another --out"),
        (["--corpus", "sotu"], "rate-0.003 was begun with --corpus books, not --corpus sotu: give another --out"),
        (["--", "--dtype", "float32"], "rate-0.003 was begun with no --dtype, not --dtype float32: give another --out"),
        (["--", "--looks", "1,3"], "study was begun with no --looks, not --looks 1,3: give another --out"),
    ],
)
def test_another_study_in_the_same_folder_is_refused(script, commands, tmp_path, monkeypatch, more, message):
    pytest.importorskip("vl_convert")
    given = ("--out", tmp_path, "--archs", "tiny", "--arms", "base,canon", "--seeds", "1")
    assert run(script, monkeypatch, *given) == 0
    before = len(commands)
    with pytest.raises(SystemExit, match=message):
        run(script, monkeypatch, *given, *more)
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
    given = ("--out", tmp_path, "--archs", "tiny", "--seeds", "1", "--arms", "base-wide,preskip")
    assert run(script, monkeypatch, *given) == 0
    *searches, study, speed = commands
    assert study[study.index("--primary") + 1] == "preskip:base-wide:sotu"
    assert not any("--primary" in command for command in (*searches, speed))  # some of them train other arms alone


@pytest.mark.parametrize(
    ("more", "corpora", "primary"),
    [
        (["--eval-corpora", "sotu:150x400"], "sotu:150x400", ["preskip:base-wide:sotu"]),
        (["--eval-corpora=wikitext2"], "wikitext2", None),
        (["--primary", "canon:base-wide:sotu"], "sotu:50x400", ["canon:base-wide:sotu"]),
    ],
)
def test_what_is_scored_and_declared_is_the_studys_alone(
    script, commands, tmp_path, monkeypatch, more, corpora, primary
):
    pytest.importorskip("vl_convert")
    monkeypatch.setitem(BEST, "base-wide", 0)
    given = ("--out", tmp_path, "--archs", "tiny", "--seeds", "1", "--arms", "base-wide,canon,preskip")
    assert run(script, monkeypatch, *given, "--", *more) == 0
    *others, study, speed = commands
    assert any(corpora in word for word in study)
    assert options(study).get("--primary") == primary
    assert not any(word.startswith(("--primary", "--eval-corpora")) for each in (*others, speed) for word in each)


def test_a_warm_up_is_of_the_trainings_that_are_long_enough(script, commands, tmp_path, monkeypatch):
    pytest.importorskip("vl_convert")
    given = (
        "--out",
        tmp_path,
        "--archs",
        "tiny",
        "--seeds",
        "1",
        "--arms",
        "base,canon",
        "--",
        "--warmup-steps",
        "100",
    )
    assert run(script, monkeypatch, *given) == 0
    *others, speed = commands
    assert all(options(command)["--warmup-steps"] == ["100"] for command in others)
    assert "--warmup-steps" not in speed


@pytest.mark.parametrize("name", ["rate-0.006", "study"])
def test_what_was_interrupted_goes_on_as_it_was_begun(script, commands, killed, tmp_path, monkeypatch, name):
    pytest.importorskip("vl_convert")
    killed.append(name)
    given = ("--out", tmp_path, "--archs", "tiny", "--seeds", "1", "--arms", "base,preskip", "--", "--workers=2")
    assert run(script, monkeypatch, *given) == script.LEFT_TO_DO
    before = len(commands)
    assert run(script, monkeypatch, *given) == 0
    assert commands[before] == ["pretrain", "--resume", str(tmp_path / "tiny" / name), "--workers", "2"]


def test_seeds_are_added_to_a_finished_study(script, commands, tmp_path, monkeypatch, capsys):
    pytest.importorskip("vl_convert")
    given = ("--out", tmp_path, "--archs", "tiny", "--arms", "base,preskip")
    assert run(script, monkeypatch, *given, "--seeds", "1,2") == 0
    before = len(commands)
    assert run(script, monkeypatch, *given, "--seeds", "1,2,3") == 0
    resumed = ["pretrain", "--resume", str(tmp_path / "tiny" / "study"), "--seeds", "1,2,3"]
    assert commands[before:] == [resumed]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `base`")]
    assert "| 2 | 1.6100, 1.1100 to 2.1100 |" in lines[0]
    assert "| 3 | 2.1100, 1.1100 to 3.1100 |" in lines[1]
