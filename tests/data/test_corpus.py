"""Corpora: every kind of source, every kind of bad input, and a split that leaks nothing."""

import gzip
import json
import os
import re

import pytest

from preskip.data import sotu
from preskip.data.corpus import Corpus, Document, _cut_long, as_scored, load_corpus, split_documents, split_text
from preskip.data.tables import Limit
from preskip.errors import PreskipError


def corpus_of(groups: dict[str, int], name: str = "made") -> Corpus:
    documents = [Document(f"{group}-{i}", f"text {group} {i}", group) for group, n in groups.items() for i in range(n)]
    return Corpus(name, tuple(documents), "made for a test")


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("We won. [Applause] Thank you. [Laughter]", "We won. Thank you."),
        ("The President. Thank you. [Applause]\n\nAudience members. Boo!\n\nSo be it.", "Thank you.\n\nSo be it."),
        ("in Panama [an eminent Colombian] says", "in Panama says"),
        ("drives up profits [prices].* When", "drives up profits. When"),
        ("based [on]* what", "based what"),
        ("almost [$]1.1 billion", "almost 1.1 billion"),
        ("and tending [trending; White House correction] lower", "and tending lower"),
        ("of 154, of which, on [March 27], the date", "of 154, of which, on, the date"),
        ("[Laughter] And now", "And now"),
        ("Rep. Greene. Liar, liar!\nI go on.", "I go on."),
        ("Representative W. Andrew Ogles IV. It's your fault!\nI go on.", "I go on."),
        ("Part I |Part II |Part III\n\nTo the Senate", "To the Senate"),
        ("a  b\t c \n\n\n\nd\r\n", "a b c\n\nd"),
        # Not cues: the same words inside prose.
        ("I thank The President. Audience members. Both", "I thank The President. Audience members. Both"),
        ("Representatives of both parties agree. They do.", "Representatives of both parties agree. They do."),
    ],
)
def test_clean_speech(raw, clean):
    assert sotu.clean_speech(raw) == clean


@pytest.mark.embedded
def test_sotu_whole():
    corpus = load_corpus("sotu", progress=False)
    assert len(corpus.documents) == 249
    assert len({document.id for document in corpus.documents}) == 249
    groups = {document.group for document in corpus.documents}
    assert len(groups) == 231
    assert {d.id for d in corpus.documents if d.group == "1956-Eisenhower"} == {
        "1956-Eisenhower-1",
        "1956-Eisenhower-2",
    }
    text = "\n".join(document.text for document in corpus.documents)
    assert not re.search(r"\[(Laughter|Applause|Inaudible|see APP)", text, flags=re.IGNORECASE)
    assert not re.search(r"^(The President|Audience members?|Rep)\. ", text, flags=re.MULTILINE)
    # Cleaning must not eat the corpus: 12,185,502 bytes raw.
    assert 12_150_000 < sum(len(document.text.encode()) for document in corpus.documents) < 12_185_502
    assert corpus.sha256 == load_corpus("sotu", progress=False).sha256
    split = split_documents(corpus)
    assert (len(split.training), len(split.heldout)) == (224, 25)
    assert not {d.group for d in split.training} & {d.group for d in split.heldout}


def test_pydoc():
    corpus = load_corpus("pydoc")
    assert len(corpus.documents) > 70
    assert "assert" in {document.id for document in corpus.documents}
    assert "Python" in corpus.source


def test_text_file_is_cut_at_form_feeds(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("\ufeffone\r\nmore\n\ftwo\n\f\n\fthree".encode())
    corpus = load_corpus(str(path))
    assert [(d.id, d.text) for d in corpus.documents] == [
        ("book#0", "one\nmore"),
        ("book#1", "two"),
        ("book#2", "three"),
    ]


def test_text_file_is_cut_at_paragraphs(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "word " * 300 for i in range(20)]
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    corpus = load_corpus(str(path))
    assert [d.id for d in corpus.documents] == ["long#0", "long#1", "long#2", "long#3"]
    assert all(len(d.text) <= 10_000 for d in corpus.documents)
    assert "\n\n".join(d.text for d in corpus.documents).split() == " ".join(paragraphs).split()
    assert all(d.text.startswith("Paragraph") for d in corpus.documents)
    # Pieces of it stand on both sides of the split, but are no independent units.
    assert len({d.group for d in corpus.documents}) == 4
    assert {as_scored(d, d.text).group for d in corpus.documents} == {"long"}


@pytest.mark.parametrize("characters", [1, 7, 50, 100_000])
@pytest.mark.parametrize(
    "text", ["", "   \n\n ", "a" * 500, "One two. Three four! " * 30, "l1\nl2\nl3", "p1\n \np2\n\n\np3"]
)
def test_split_text_loses_nothing(text, characters):
    pieces = split_text(text, characters)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(piece.strip() for piece in pieces)
    assert all(len(piece) <= 2 * characters for piece in pieces)


@pytest.mark.parametrize(
    "text",
    [
        "if x:\n    y\n    z",
        "def f():\n    a = 1\n\n\n    return a\n\n\ndef g():\n\tpass",
        "  A verse\n    that steps\n \n  in  and out ",
        "One sentence. " * 40 + "End.\n\nNext.",
    ],
)
def test_split_text_changes_nothing_inside_a_piece(text):
    assert split_text(f"\n{text}\n\n", 1000) == [text]
    pieces = split_text(text, 20)
    assert len(pieces) > 1 or len(text) < 30
    place = 0
    for piece in pieces:
        begin = text.index(piece, place)
        assert not text[place:begin].strip()
        place = begin + len(piece)
    assert not text[place:].strip()


def test_a_cut_leaves_the_indentation_of_the_next_line():
    assert split_text("def f():\n    a = 1\n\n    return a", 20) == ["def f():\n    a = 1", "    return a"]
    assert split_text("One two.\n    Three four.\n    Five six.\n\nEnd.", 10) == [
        "One two.",
        "    Three",
        "four.\n    Five six.",
        "End.",
    ]


def test_folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    for place, text in {"b.md": "B", "sub/a.txt": "A", "empty.txt": " ", "c.py": "no", ".hidden/x.txt": "no"}.items():
        (tmp_path / place).write_text(text, encoding="utf-8")
    assert [(d.id, d.text) for d in load_corpus(str(tmp_path)).documents] == [("b.md", "B"), ("sub/a.txt", "A")]


def test_a_run_inside_a_folder_is_no_text_of_it(tmp_path, capsys):
    for place, text in {"b.md": "B", "sub/a.txt": "A"}.items():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(text)
    (tmp_path / "sub" / "run.json").write_text('{"schema_version": 1}')  # another program's
    before = load_corpus(str(tmp_path))
    assert len(before.documents) == 2
    adapter = tmp_path / "runs" / "first" / "arms" / "lora" / "adapter"
    adapter.mkdir(parents=True)
    (tmp_path / "runs" / "first" / "run.json").write_text('{"schema_version": 1, "config": {}}')
    (adapter / "README.md").write_text("A model card.")
    assert load_corpus(str(tmp_path)) == before
    assert "1 run(s) in it are left out, e.g. runs/first" in capsys.readouterr().err


def test_files_without_text_are_told(tmp_path, capsys):
    for place, text in {"a.txt": "A", "b.txt": "\n \n", "c.md": ""}.items():
        (tmp_path / place).write_text(text)
    assert [document.text for document in load_corpus(str(tmp_path)).documents] == ["A"]
    assert "2 file(s) without text are left out, e.g. b.txt" in capsys.readouterr().err


def test_packed_texts_are_as_they_are_unpacked(tmp_path):
    for place, packs in (("plain", False), ("packed", True)):
        (tmp_path / place / "sub").mkdir(parents=True)
        for name, text in {"a.txt": "one\fnaïve\r\ntwo", "sub/b.md": "three"}.items():
            file, raw = tmp_path / place / name, text.encode()
            (file.with_name(file.name + ".gz") if packs else file).write_bytes(gzip.compress(raw) if packs else raw)
    for name in ("", "a.txt", "sub/b.md"):
        plain = load_corpus(str(tmp_path / "plain" / name))
        packed = load_corpus(str(tmp_path / "packed" / name) + (".gz" if name else ""))
        assert packed.documents == plain.documents
    (tmp_path / "packed" / "a.txt").write_text("both")
    ids = [document.id for document in load_corpus(str(tmp_path / "packed")).documents]
    assert ids == ["a.txt", "a.txt.gz", "sub/b.md"]


def test_jsonl(tmp_path):
    path = tmp_path / "x.jsonl"
    rows = [{"text": "a\u2028b"}, {"text": "two", "id": 7, "group": "g"}, {"text": " "}, {"text": "two", "id": "z"}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    documents = load_corpus(str(path)).documents
    assert [(d.id, d.text) for d in documents] == [("x#1", "a\u2028b"), ("7", "two"), ("z", "two")]
    assert documents[1].group == "g"


def test_duplicates_share_a_group(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "same  words"}\n{"text": "same words"}\n{"text": "other"}\n', encoding="utf-8")
    first, second, third = load_corpus(str(path)).documents
    assert first.group == second.group != third.group


def test_no_text_is_on_both_sides_though_its_rows_name_other_groups(tmp_path):
    """Groups that share a text are one, under the first of their names; others keep theirs."""
    path = tmp_path / "x.jsonl"
    rows = [{"text": f"text {place % 10}", "group": f"g{place:02d}"} for place in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for seed in range(4):
        split = split_documents(load_corpus(str(path)), 0.2, seed)
        assert len(split.heldout) == 8
        assert not {document.text for document in split.training} & {document.text for document in split.heldout}
    rows = [{"text": "a", "group": "z"}, {"text": "b", "group": "z"}, {"text": "b", "group": "y"}, {"text": "a"}]
    rows += [{"text": "c", "group": "y"}, {"text": "d", "group": "x"}, {"text": "e"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    *groups, alone = (document.group for document in load_corpus(str(path)).documents)
    assert groups == ["y", "y", "y", "y", "y", "x"]
    assert alone.startswith("text-")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 5}', 'line 2: no string "text"'),
        ("[1]", 'line 2: no string "text"'),
        ('{"text": "cut', "line 2: not valid JSON"),
        ('{"text": "again", "id": "a"}', "line 2: id 'a' is already that of line 1"),
    ],
)
def test_bad_jsonl_line(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "fine", "id": "a"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(PreskipError, match=re.escape(message)):
        load_corpus(str(path))


def test_a_file_name_that_is_no_utf_8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("Some text.\n")
    (tmp_path / "plain.txt").write_text("Other text.\n")
    ids = [document.id for document in load_corpus(str(tmp_path)).documents]
    assert sorted(ids) == ["caf\ufffd.txt", "plain.txt"]
    assert all(name.encode() for name in ids)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.txt", b"", "is empty"),
        ("e.jsonl", b"\n\n", "is empty"),
        ("l.txt", "café".encode("latin-1"), r"l\.txt is not UTF-8 \(byte 3\)"),
        ("z.txt", b"PK\x00\x01", "zero bytes"),
        ("t.zip", b"a,b", r"\.zip files are not read"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PreskipError, match=message) as caught:
        load_corpus(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_unknown_names(tmp_path):
    with pytest.raises(PreskipError, match="embedded are pydoc, sotu"):
        load_corpus("sotuu")
    with pytest.raises(PreskipError, match=r"no\.txt does not exist"):
        load_corpus(str(tmp_path / "no.txt"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(PreskipError, match=r"no \.txt or \.md files"):
        load_corpus(str(tmp_path / "nothing"))


def test_hub_id_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        PreskipError, match="nobody/nothing: is not in the local cache and HF_HUB_OFFLINE is set"
    ) as caught:
        load_corpus("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "wanted", "expected"),
    [
        ({"label": 1, "text": "t", "title": "x"}, None, "t"),
        ({"label": 1, "content": "t", "title": "x"}, None, "t"),
        ({"label": 1, "body": "t"}, None, "t"),
        ({"a": "x", "b": "t"}, "b", "t"),
    ],
)
def test_hub_columns_and_cap(monkeypatch, columns, wanted, expected):
    import datasets

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    calls = []

    def fake(repository, config, split, streaming):
        calls.append((repository, config, split, streaming))
        return iter([columns] * 50)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    corpus = load_corpus("some/set:part", text_column=wanted, limit=Limit(reason="three", documents=3))
    assert calls == [("some/set", "part", "train", True)]
    assert [(d.id, d.text) for d in corpus.documents] == [(f"train#{i + 1}", expected) for i in range(3)]
    assert len(load_corpus("some/set", text_column=wanted, limit=Limit(reason="five", documents=5)).documents) == 5


def test_hub_ambiguous_column(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: iter([{"a": "x", "b": "y"}]))
    with pytest.raises(PreskipError, match="a, b hold strings: choose one"):
        load_corpus("some/set")
    with pytest.raises(PreskipError, match="no column 'c'"):
        load_corpus("some/set", text_column="c")


def test_split_is_by_group_and_independent_of_order():
    corpus = corpus_of({f"g{i}": 1 + i % 3 for i in range(30)})
    shuffled = Corpus("made", tuple(reversed(corpus.documents)), "made for a test")
    split = split_documents(corpus, 0.2, seed=3)
    assert split == split_documents(shuffled, 0.2, seed=3)
    assert corpus.sha256 == shuffled.sha256
    assert split != split_documents(corpus, 0.2, seed=4)
    assert len(split.heldout) == 12  # 20 % of 60, reached exactly since groups of one are there
    assert not {d.group for d in split.training} & {d.group for d in split.heldout}
    assert sorted(split.training + split.heldout, key=lambda d: d.id) == sorted(corpus.documents, key=lambda d: d.id)


def test_split_gives_something_to_either_side():
    assert [len(side) for side in split_documents(corpus_of({"a": 5, "b": 3}), 0.1)] == [5, 3]
    assert [len(side) for side in split_documents(corpus_of({"a": 1, "b": 1}), 0.99)] == [1, 1]


def test_split_refuses():
    with pytest.raises(PreskipError, match="has 1 independent document"):
        split_documents(corpus_of({"a": 4}))
    for fraction in (0.0, 1.0, -0.1, 2.0, float("nan")):
        with pytest.raises(PreskipError, match="held-out fraction"):
            split_documents(corpus_of({"a": 1, "b": 1}), fraction)


@pytest.mark.parametrize("text", ["One two. Three! " * 400, "x" * 5000, "漢字" * 3000, "a  b\t c " * 900])
def test_a_long_line_is_cut_reading_each_character_a_few_times(text):
    read = []

    class Counted(str):
        """A text that counts what is copied out of it."""

        def __getitem__(self, key):
            part = str.__getitem__(self, key)
            read.append(len(part))
            return Counted(part)

        def strip(self):
            return Counted(str.strip(self))

    line = text.strip()
    spans = _cut_long(Counted(line), 50)
    assert sum(read) < 5 * len(text)
    parts = [line[begin:end] for begin, end in spans]
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(0 < len(part) <= 100 for part in parts)


def test_an_id_that_a_row_without_one_would_get_is_refused(tmp_path):
    """Items are paired by their ids, so it must not end the scoring in hours."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"id": "rows#1", "text": "two"}\n')
    with pytest.raises(PreskipError, match="id 'rows#1' stands for two documents: ids must be unique"):
        load_corpus(str(path))
