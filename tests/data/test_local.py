"""The data directory: every file in the schema of the Hub's data set, and the real ones where they are at hand."""

import hashlib
import json
import math
import re

import pytest

from local_data import SENTENCES, write_lines, write_local_data
from preskip.data.local import (
    data_directory,
    detokenise_lambada,
    lambada_development,
    load_local,
)
from preskip.data.wikitext import page_title
from preskip.errors import PreskipError

REAL = data_directory()
needs_data = pytest.mark.skipif(REAL is None, reason="the data directory is not there (PRESKIP_DATA)")


@pytest.fixture
def folder(tmp_path):
    return write_local_data(tmp_path / "data")


def test_the_directory_is_the_given_then_the_environments_then_the_default(tmp_path, monkeypatch):
    monkeypatch.delenv("PRESKIP_DATA", raising=False)
    (tmp_path / "a").mkdir()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    assert data_directory() is None
    (tmp_path / "share/preskip").mkdir(parents=True)
    assert data_directory() == tmp_path / "share/preskip"
    monkeypatch.setenv("XDG_DATA_HOME", "share")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_directory() is None
    (tmp_path / ".local/share/preskip").mkdir(parents=True)
    assert data_directory() == tmp_path / ".local/share/preskip"
    monkeypatch.setenv("PRESKIP_DATA", str(tmp_path / "a"))
    assert data_directory() == tmp_path / "a"
    assert data_directory(tmp_path) == tmp_path
    with pytest.raises(PreskipError, match=r"--data-dir: folder .*nowhere does not exist"):
        data_directory(tmp_path / "nowhere")
    monkeypatch.setenv("PRESKIP_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(PreskipError, match="PRESKIP_DATA: folder"):
        data_directory()


def test_rows_have_the_schema_of_the_hub(folder):
    assert load_local("lambada_openai", folder).splits["test"][0] == {"text": SENTENCES[0]}
    arc = load_local("arc_easy", folder)
    words = SENTENCES[1].split()[:3]
    assert arc.splits["test"][1] == {
        "id": "q1",
        "question": f"{SENTENCES[1]}?",
        "choices": {"text": words, "label": ["A", "B", "C"]},
        "answerKey": "B",
    }
    assert arc.splits["validation"][0]["choices"] == {"text": ["harbor", "ship"], "label": ["1", "2"]}
    assert arc.splits["validation"][0]["answerKey"] == "2"
    assert [row["page"].strip().split("\n")[0].strip() for row in load_local("wikitext", folder).splits["test"]] == [
        "= First page =",
        "= Second ( page ) =",
    ]


def test_hellaswag_rows_come_out_of_lm_evals_own_processing_as_published(folder):
    process_docs = pytest.importorskip("lm_eval.tasks.hellaswag.utils").process_docs
    import datasets

    for place in filter(None, (folder, REAL)):
        data = load_local("hellaswag", place)
        published = [json.loads(line) for line in (place / data.files[0]).open(encoding="utf-8")]
        processed = process_docs(datasets.Dataset.from_list(data.splits["validation"]))
        for row, original in zip(processed, published, strict=True):
            assert (row["query"], row["choices"], row["gold"]) == (
                original["query"],
                original["choices"],
                original["gold"],
            )
            assert row["label"] == str(original["gold"])


def test_absent_data_are_none_and_damaged_data_are_named(folder, tmp_path):
    assert load_local("piqa", folder) is None
    assert load_local("lambada_openai", None) is None
    assert load_local("lambada_openai", tmp_path) is None
    path = folder / "arc_easy/arc_easy_test.jsonl"
    checksum = load_local("arc_easy", folder).sha256
    path.write_text(path.read_text().replace("q0", "q00"))
    assert load_local("arc_easy", folder).sha256 != checksum
    write_lines(path, [{"id": "q0", "question": "?", "choices": ["a", "b"], "gold": 2}])
    with pytest.raises(PreskipError, match=r"arc_easy_test.jsonl, item 1: not in the documented form"):
        load_local("arc_easy", folder)
    path.write_text('{"id": ')
    with pytest.raises(PreskipError, match=r"line 1: not valid JSON"):
        load_local("arc_easy", folder)
    path.write_text("\n")
    with pytest.raises(PreskipError, match="is empty"):
        load_local("arc_easy", folder)
    (folder / "lambada/lambada_development_plain_text.txt").unlink()
    with pytest.raises(PreskipError, match="does not exist"):
        lambada_development(folder)


FILES = {
    "lambada_openai": "lambada/lambada_openai_test.jsonl",
    "arc_easy": "arc_easy/arc_easy_test.jsonl",
    "hellaswag": "hellaswag/hellaswag_val_1000_olmes.jsonl",
    "wikitext": "wikitext2/wiki.test.raw",
    "development": "lambada/lambada_development_plain_text.txt",
}


@pytest.mark.parametrize("task", FILES)
def test_a_mark_of_utf_8_is_read_and_other_encodings_are_one_line(folder, task):
    path = folder / FILES[task]

    def read():
        return lambada_development(folder) if task == "development" else load_local(task, folder).splits

    content, plain = path.read_bytes(), read()
    path.write_bytes(b"\xef\xbb\xbf" + content)
    assert read() == plain
    path.write_bytes(content + b"caf\xe9\n")
    with pytest.raises(PreskipError, match=rf"{path.name} is not UTF-8 \(byte {len(content) + 3}\): convert it"):
        read()


def test_the_checksum_of_one_file_is_that_file(folder):
    data = load_local("lambada_openai", folder)
    assert data.files == ("lambada/lambada_openai_test.jsonl",)
    assert data.sha256 == hashlib.sha256((folder / data.files[0]).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("tokenised", "text"),
    [
        ("`` nineteen , '' she said , and he left .", '"nineteen," she said, and he left.'),
        ("it was n't her captain 's fault ; they 'd gone", "it wasn't her captain's fault; they'd gone"),
        ("` just in case , ' he grunted", "'just in case,' he grunted"),
        ("the boys ' room ( upstairs ) was empty", "the boys' room (upstairs) was empty"),
        ("`` what ? '' `` no ! ''", '"what?" "no!"'),
        ("so many words ... and  spaces", "so many words... and spaces"),
    ],
)
def test_detokeniser(tokenised, text):
    assert detokenise_lambada(tokenised) == text


def test_development_passages_are_documents(folder):
    first, second = lambada_development(folder)
    assert first.text == '"i don\'t know," she said'
    assert second.text == "the captain's ship (a boat) was 'gone'; but he waited"
    assert first.id != second.id
    assert first.group != second.group


@needs_data
def test_the_real_files_are_the_canonical_ones():
    lambada = load_local("lambada_openai", REAL)
    assert len(lambada.splits["test"]) == 5153
    assert lambada.sha256 == "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"
    pages = [row["page"] for row in load_local("wikitext", REAL).splits["test"]]
    titles = [page_title(page.strip().split("\n")[0]) for page in pages]
    assert len(set(titles)) == len(titles) == 62
    assert titles[:2] == ["Robert Boulter", "Du Fu"]
    # Published figures of Llama-2-7B (lm-evaluation-harness issue 806) tell the bytes per word of lm-eval's pages:
    # log of word perplexity over log of byte perplexity.
    published = math.log(8.792073612124492) / math.log(1.5015845643537054)
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    assert sum(len(page.encode()) for page in pages) / words == pytest.approx(published, rel=1e-9)
    assert {name: len(rows) for name, rows in load_local("arc_easy", REAL).splits.items()} == {
        "test": 2376,
        "validation": 570,
    }
    assert len(load_local("hellaswag", REAL).splits["validation"]) == 1000
    development = lambada_development(REAL)
    assert len(development) == 4869
    assert not any("``" in document.text or " n't" in document.text for document in development)
