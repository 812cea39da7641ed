"""Runs that are started at once, moved, linked, or watched by something that fails; names and advice."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from commands import PROBE, make_run, preskip
from preskip.cli.runs import _started, free_places
from preskip.data.corpus import split_text
from preskip.data.splits import slug
from preskip.errors import PreskipError
from preskip.experiment.frozen import _in_options
from preskip.experiment.parse import parse_corpora
from preskip.progress import drawn, progress_bar, say, spinner
from preskip.runs.files import read_json, read_jsonl, write_json, write_jsonl
from preskip.runs.schema import SCHEMA_VERSION
from preskip.runs.weights import adapter_folders, find_source
from tiny_model import save_tiny_llama, write_corpus


def test_two_runs_started_in_one_second(tmp_path, monkeypatch):
    """Both have looked for a free place before either has begun."""
    monkeypatch.chdir(tmp_path)
    places = free_places(Path("runs/now"))

    def start(path):
        if path.exists():
            raise PreskipError(f"{path} exists already")
        path.mkdir(parents=True)
        return path

    assert [str(_started(start, places)) for _ in range(3)] == ["runs/now", "runs/now-2", "runs/now-3"]
    assert free_places(Path("runs/now"))[0] == Path("runs/now-4")
    with pytest.raises(PreskipError, match="exists already"):
        _started(start, places[:1])  # a place that was asked for is not changed

    def refused(path):
        raise PreskipError("no such device")

    with pytest.raises(PreskipError, match="no such device"):
        _started(refused, places[4:])


def test_a_run_that_is_moved_or_linked_is_resumed_and_explained(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = make_run(tmp_path / "made") / "run"
    cell = made / "arms" / "preskip" / "seed-42"
    before = json.loads((made / "results.json").read_text())["arms"]["preskip"]["metrics"]
    moved = made.rename(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(moved)
    (moved / "arms" / "preskip").rename(tmp_path / "disk")
    (moved / "arms" / "preskip").symlink_to(tmp_path / "disk")  # the weights on another disk
    (moved / "results.json").unlink()
    assert preskip("probe", "--resume", "link", "--json") == 0
    assert json.loads((moved / "results.json").read_text())["arms"]["preskip"]["metrics"] == before
    found = find_source(tmp_path / "link" / cell.relative_to(made) / "adapter")
    assert (found.arm, found.seed) == ("preskip", 42)
    capsys.readouterr()


@pytest.mark.parametrize("command", ["probe", "pretrain"])
def test_a_run_without_its_options_is_not_resumed(command, tmp_path, capsys):
    write_json(tmp_path / "run.json", {"schema_version": SCHEMA_VERSION})
    assert preskip(command, "--resume", tmp_path) == 1
    assert capsys.readouterr().err.strip().endswith("run.json is damaged, it holds no options: begin a new run")
    assert os.listdir(tmp_path) == ["run.json"]


class Broken:
    encoding, errors = "utf-8", "strict"

    def isatty(self):
        return True

    def write(self, text):
        raise OSError("the terminal is gone")

    flush = fileno = write


@pytest.mark.parametrize("stream", [None, Broken()])
def test_what_only_shows_does_not_end_the_work(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    done = []
    say("a line")
    with spinner("work") as note, progress_bar("steps", 3) as advance:
        note("more")
        advance(1, "note")
        done.append("work")
    with drawn("page"):
        raise RuntimeError("no fonts")
    assert done == ["work"]
    with pytest.raises(KeyError), spinner("work"):
        raise KeyError  # what the work itself raises passes


def test_results_stay_where_the_page_cannot_be_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def broken(run):
        raise RuntimeError("no fonts")

    monkeypatch.setattr("preskip.report.build_report", broken)
    save_tiny_llama(tmp_path / "model")
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    assert preskip("probe", "model", *PROBE, "--corpus", corpus, "--arms", "none", "--out", "run") == 0
    assert "no report.html: no fonts" in capsys.readouterr().err
    assert (tmp_path / "run" / "results.json").is_file()


def test_adapters_with_numbers_for_names_are_no_stack(tmp_path):
    for name, kind in (("1", "PRESKIP"), ("2", "PRESKIP")):
        (tmp_path / "named" / name).mkdir(parents=True)
        (tmp_path / "named" / name / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(PreskipError, match="holds 2 adapters, 1, 2: give one of them"):
        adapter_folders(tmp_path / "named")
    (tmp_path / "named" / "2" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert [part.name for part in adapter_folders(tmp_path / "named")] == ["1", "2"]


def test_a_copy_beside_a_seed_is_no_seed(tmp_path):
    write_json(tmp_path / "run.json", {"schema_version": SCHEMA_VERSION, "config": {}, "seeds": [1]})
    for name in ("seed-1", "seed-1 (copy)", "seed-1.bak"):
        cell = tmp_path / "arms" / "preskip" / name
        write_json(cell / "adapter" / "adapter_config.json", {"peft_type": "PRESKIP"})
        write_json(cell / "cell.json", {})
    assert find_source(tmp_path).weights == tmp_path / "arms" / "preskip" / "seed-1" / "adapter"
    with pytest.raises(PreskipError, match=r"has no finished seed 2: choose one of 1$"):
        find_source(tmp_path, seed=2)


def test_commas_in_names_do_not_cut_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "c.txt"):
        (tmp_path / name).write_text("x")
    assert parse_corpora("books,a,b.txt:4x9,c.txt, wikitext2") == ("books", "a,b.txt:4x9", "c.txt", "wikitext2")
    assert parse_corpora(["a,b.txt", "c.txt"]) == ("a,b.txt", "c.txt")
    many = [f"{'long ' * 5}{number}.txt" for number in range(20)]  # together longer than a file's name can be
    assert parse_corpora(",".join(many)) == tuple(many)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x/แม่น้ำ.csv", "แม่น้ำ"),
        ("naïve 文.jsonl", "naïve-文"),
        ("cafe\u0301.txt", "cafe\u0301"),
        ("a,b.json", "a-b"),
        ("हिन्दी", "हिन्दी"),
    ],
)
def test_letters_of_every_script_stay_together(name, expected):
    assert slug(name) == expected


def test_advice_names_options_of_the_command():
    text = "give layers_to_transform=[0, 2] to adapt only the others; target_modules='x' match nothing"
    assert _in_options(text) == "give --layers 0,2 to adapt only the others; --target-modules 'x' match nothing"


def test_one_long_line_is_cut_in_linear_time():
    """Twice the text takes about twice the time; copying the rest at every cut would take four times as long."""

    def seconds(size):
        text = "word " * (size // 5)
        began = time.process_time()
        pieces = split_text(text, 100)
        assert sum(map(len, pieces)) + len(pieces) >= size - 5 * len(pieces)
        return time.process_time() - began

    seconds(10_000)
    assert min(seconds(8_000_000) for _ in range(2)) < 10 * min(seconds(2_000_000) for _ in range(2)) + 0.05


def test_a_path_that_is_not_utf8_is_recorded(tmp_path):
    name = os.fsdecode(b"a\xff.txt")
    write_json(tmp_path / "run.json", {"corpus": name})
    write_jsonl(tmp_path / "items.jsonl", [{"id": name}])
    assert read_json(tmp_path / "run.json") == {"corpus": name}
    assert read_jsonl(tmp_path / "items.jsonl") == [{"id": name}]
