"""The command line itself: help, mistakes, files of options, time to answer."""

import errno
import inspect
import io
import json
import os
import signal
import subprocess
import sys

import pytest

from commands import PROBE, preskip
from preskip.branch_settings import BranchSettings
from preskip.cli import main
from preskip.errors import PreskipError
from preskip.experiment.option_file import configured
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.experiment.probe_options import ProbeConfig
from preskip.fields import flags
from tiny_model import save_tiny_llama, write_corpus


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["probe", "--stepz", "3"], "Unknown option: --stepz. Did you mean --steps? See preskip probe --help."),
        (["probe", "--steps", "three"], 'Invalid value for --steps: unable to convert "three" into int.'),
        (["probe", "--steps"], "--steps requires an argument"),
        (["probe", "a", "b"], "Unused Tokens: ['b']"),
        (["eval"], "--model requires an argument"),
        (["eval", "m", "--dtype", "int8"], "--dtype 'int8' is unknown: choose one of auto, float32, bfloat16, float16"),
        (["eval", "m", "--sample-seed", "-1"], "--sample-seed -1 is not possible: it must be at least 0"),
        (["audit", "m", "--sample-seed", "-1"], "--sample-seed -1 is not possible: it must be at least 0"),
        (["explain", "x", "--words", "1"], "--words 1 is not possible: it must be at least 2"),
        (["pretrain", "--workers", "0"], "--workers 0 is not possible: it must be at least 1"),
        (["probe", "--workers", "0"], "--workers 0 is not possible: it must be at least 1"),
        (
            ["probe", "--eval-corpora", "a.txt", "--eval-corpora", "b.txt"],
            "Parameter --eval-corpora specified multiple",
        ),
        (["probe", "m", "--config", "a.yaml", "--config", "b.yaml"], "Parameter --config specified multiple times."),
        (["eval", "m", "--tasks", "wikitext", "--tasks", "piqa"], "Parameter --tasks specified multiple times."),
        (["compare", "x", "--arms", "lora", "--arms", "skip"], "Parameter --arms specified multiple times."),
        (["probe", "--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
        (
            ["probe", "--resume", "x", "--config", "y"],
            "--resume takes every option but --seeds from the run: leave out config",
        ),
        (["probe", "--resume", "x", "--out", "y", "--steps", "3"], "but --seeds from the run: leave out out, steps"),
    ],
)
def test_a_mistake_is_one_line_with_its_mend(arguments, message, capsys):
    assert preskip(*arguments, "--json") == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert json.loads(captured.out)["error"] == line.removeprefix("error: ")


LONG = f"./{'x' * 300}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["probe", LONG],
        ["probe", "--corpus", LONG],
        ["bake", LONG, "out"],
        ["eval", "./no", "--corpus", "sotu", "--out", LONG],
    ],
)
def test_a_name_that_no_file_can_have_is_one_line(arguments, capsys):
    assert preskip(*arguments, "--json") == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert json.loads(captured.out)["error"] == line.removeprefix("error: ")


@pytest.mark.parametrize("arguments", [["probe", "/home/ada/model"], ["probe", "--corpus", "/home/ada/x.jsonl"]])
def test_a_folder_of_someone_else_is_one_line(arguments, capsys, monkeypatch):
    """Root, as which tests may run, is never refused."""
    stat = os.stat

    def refuse(path, *args, **options):
        if str(path).startswith("/home/ada/"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert preskip(*arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert arguments[-1] in line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EACCES, "No way", "a/b"), "a/b is out of reach (No way): check its permissions"),
        (OSError(errno.ENAMETOOLONG, "Too long", "a/b"), "a/b is out of reach (Too long): give a shorter name"),
        (OSError(errno.EACCES, "No way"), None),
        (OSError(errno.EIO, "Broken", "a/b"), None),
    ],
)
def test_of_the_systems_errors_those_that_a_user_can_mend_are_one_line(error, words, monkeypatch, capsys):
    def fail(arguments, console):
        raise error

    monkeypatch.setattr(main, "app", fail)
    if words is None:
        with pytest.raises(OSError, match=error.strerror):
            main.main(["doctor", "--json"])
        return
    assert preskip("doctor", "--json") == 1
    captured = capsys.readouterr()
    assert captured.err == f"error: {words}\n"
    assert json.loads(captured.out) == {"error": words}


@pytest.mark.parametrize(("command", "kind"), [("probe", ProbeConfig), ("pretrain", PretrainConfig)])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_shows_every_flag_in_its_group(command, kind, flag, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert preskip(command, flag) == 0
    shown = capsys.readouterr().out
    for name in flags(kind):
        assert f"--{name.replace('_', '-')} " in shown, name
    headings = [line.split()[1] for line in shown.splitlines() if line.startswith("╭")]
    assert [name for name in headings if name in ("What", "Training", "Branch", "Evaluation", "Output")] == [
        "What",
        "Training",
        "Branch",
        "Evaluation",
        "Output",
    ]
    for name in ("gated", "preprojection"):
        assert f"--{name} --no-{name}" in shown
    assert "runs/<time>-" in shown


def test_help_shows_the_defaults_of_a_run_without_options():
    config = configured(ProbeConfig, {})
    shown = inspect.signature(main.probe).parameters
    for name, its in flags(ProbeConfig).items():
        value = getattr(config, its.field)
        value = getattr(value, its.part) if its.part else value
        value = ",".join(map(str, value)) if isinstance(value, tuple) else value
        assert str(shown[name].default) == str(None if value in ("", {}) else value), name


def test_every_command_is_listed_with_what_it_does(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert preskip() == 0
    shown = capsys.readouterr().out
    places = [shown.index(f"│ {name} ") for name in ("probe", "eval", "compare", "power", "audit", "explain", "report")]
    assert places == sorted(places)
    assert "Insert Preskip into a frozen model" in shown


def test_completion_for_the_shell(capsys, monkeypatch):
    monkeypatch.setenv("SHELL", "/bin/bash")
    assert preskip("--show-completion") == 0
    assert "--gradient-checkpointing" in capsys.readouterr().out


def test_help_loads_no_library_that_takes_seconds():
    code = "import sys; from preskip.cli.main import main\ntry: main(['probe', '-h'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'transformers', 'peft', 'scipy', 'pyarrow', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_run_from_a_file_and_another_from_that_runs_record(tmp_path, capsys):
    """Preset, file and flags in one; then the same configuration again, from another folder's record alone."""
    model, corpus = save_tiny_llama(tmp_path / "model"), write_corpus(tmp_path / "corpus.jsonl")
    options = {name.removeprefix("--"): value for name, value in zip(PROBE[::2], PROBE[1::2], strict=True)}
    options |= {"model": str(model), "corpus": str(corpus), "arms": "none", "steps": 7, "no-such": 1}
    file = tmp_path / "options.json"
    file.write_text(json.dumps(options))
    assert preskip("probe", "--config", file, "--out", tmp_path / "no") == 1
    assert f"{file}: 'no_such' is no option of `preskip probe`" in capsys.readouterr().err
    del options["no-such"]
    file.write_text(json.dumps(options))
    call = ["probe", "--config", file, "--steps", "5", "--expansion", "2", "--json"]
    assert preskip(*call, "--out", tmp_path / "one") == 0
    assert preskip("probe", "--config", tmp_path / "one" / "run.json", "--json", "--out", tmp_path / "two") == 0
    one, two = (json.loads((tmp_path / run / "run.json").read_text())["config"] for run in ("one", "two"))
    assert (one["steps"], one["arms"], one["seq_len"], one["model"]) == (5, ["none"], 16, str(model))
    assert BranchSettings(**one["settings"]) == BranchSettings(expansion=2.0)
    assert one == two


@pytest.mark.parametrize("command", ["probe", "pretrain"])
def test_defaults_are_accepted_where_something_has_imported_pydantic(command, capsys, tmp_path, monkeypatch):
    pytest.importorskip("pydantic")
    monkeypatch.chdir(tmp_path)
    assert preskip(command, "--corpus", "/nowhere", "--json") == 1
    assert json.loads(capsys.readouterr().out) == {"error": "corpus /nowhere does not exist: check the path"}


class Stdout:
    """Stands in for a command that prints what it is given."""

    def __init__(self, *texts):
        self.texts = texts

    def __call__(self, arguments, console):
        for text in self.texts:
            print(text)
        raise PreskipError("no such thing: choose another")


@pytest.mark.parametrize("texts", [["a short one"], ["x" * 2**20]])
def test_a_reader_that_is_gone_ends_a_command_in_silence(texts, monkeypatch, capfd):
    """As `| head` is when it has read enough."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(main, "app", Stdout(*texts))
    with open(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert preskip("doctor", "--json") == 141
        monkeypatch.undo()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line(monkeypatch, capfd):
    monkeypatch.setattr(main, "app", lambda arguments, console: print("results"))
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert preskip("doctor") == 1
        monkeypatch.undo()
    words = "error: stdout cannot be written (No space left on device): send it elsewhere"
    assert capfd.readouterr().err.splitlines()[-1] == words


def test_what_stdout_cannot_encode_is_escaped(monkeypatch):
    """A minus of ours, and a path that is not UTF-8."""
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="ascii"))
    monkeypatch.setattr(main, "app", lambda arguments, console: (print("−0.01 a\udcff"), console.print("± 1")))
    main.main(["doctor"])
    assert content.getvalue() == b"\\u22120.01 a\\udcff\n\\xb1 1\n"


def test_a_home_directory_behind_an_equals_sign(monkeypatch):
    seen = []
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setattr(main, "app", lambda arguments, console: seen.extend(arguments))
    main.main(["probe", "~/model", "--out=~/run", "--seeds=1", "--text", "~50", "--name=a~/b"])
    assert seen == [
        "probe",
        "/home/ada/model",
        "--out=/home/ada/run",
        "--seeds=1",
        "--text",
        "~50",
        "--name=a~/b",
    ]


@pytest.mark.parametrize(("before", "code"), [(signal.SIG_DFL, 128 + signal.SIGHUP), (signal.SIG_IGN, 0)])
def test_a_closed_terminal_ends_a_command_in_order_unless_under_nohup(before, code, monkeypatch, capsys):
    def command():
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            print("tidied")

    monkeypatch.setattr(main, "app", lambda arguments, console: command())
    own = signal.signal(signal.SIGHUP, before)
    try:
        if code:
            assert preskip("doctor") == code
        else:
            main.main(["doctor"])
        assert signal.getsignal(signal.SIGHUP) is before
    finally:
        signal.signal(signal.SIGHUP, own)
    assert capsys.readouterr().out == "tidied\n"
