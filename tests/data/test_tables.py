"""Texts that `datasets` reads: every format, every kind of bad input, and limits; held against pandas' own reading."""

import gzip
import json
import subprocess
import sys

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preskip.data.corpus import load_corpus
from preskip.data.splits import choose, load_splits, slug
from preskip.data.tables import HUB_LIMIT, Limit
from preskip.errors import PreskipError

# What must come through as it is, what is skipped, and a comma, a quote and a line end for CSV.
TEXTS = ["Ship one.", None, 'A "quoted", long\nline.', "   ", "NA", "naïve", "Ship one."]
READ = [(0, "Ship one."), (2, 'A "quoted", long\nline.'), (4, "NA"), (5, "naïve"), (6, "Ship one.")]
FRAME = pd.DataFrame({"n": range(len(TEXTS)), "text": TEXTS})


def told(capsys) -> str:
    """What stands on stderr beside the progress of reading."""
    return "".join(line for line in capsys.readouterr().err.splitlines(True) if not line.startswith("reading "))


def write(path, frame=FRAME):
    """Write a frame with pandas or pyarrow in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        frame.to_parquet(path)
    elif name.endswith(".arrow"):
        table = pa.Table.from_pandas(frame, preserve_index=False)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    elif name.endswith((".csv", ".tsv")):
        frame.to_csv(path, index=False, sep="\t" if name.endswith(".tsv") else ",")
    else:
        frame.to_json(path, orient="records", lines=not name.endswith(".json"))
    return path


def found(path, **options):
    return [(document.id, document.text) for document in load_corpus(str(path), progress=False, **options).documents]


FILES = ["a.parquet", "a.arrow", "a.csv", "a.CSV", "a.tsv", "a.csv.gz", "a.tsv.gz", "a.json", "a.json.gz", "a.jsonl.gz"]


@pytest.mark.parametrize("name", [*FILES, "b[1]*.parquet"])
def test_every_format_gives_the_same_texts(tmp_path, name):
    path = write(tmp_path / name.lower()).rename(tmp_path / name)
    corpus = load_corpus(str(path), progress=False)
    assert [(d.id, d.text) for d in corpus.documents] == [
        (f"{path.name.split('.')[0]}#{row + 1}", text) for row, text in READ
    ]
    assert corpus.documents[0].group == corpus.documents[-1].group != corpus.documents[1].group
    assert (corpus.whole, corpus.source) == (True, f"file {path}")


FORMS = ["jsonl", "ndjson", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "tsv", "parquet", "arrow"]


def every_form(folder, frame, monkeypatch):
    """The same rows as a file of each form, saved to disk, and on the Hub; all parts are named train."""
    paths = [write(folder / form / f"train.{form.replace('ndjson', 'jsonl')}", frame) for form in FORMS]
    paths[1] = paths[1].rename(paths[1].with_suffix(".ndjson"))
    rows = datasets.Dataset.from_pandas(frame, preserve_index=False)
    rows.save_to_disk(folder / "saved")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: iter(rows) if a[0] == "some/set" else load(*a, **o))
    return [*paths, folder / "saved", "some/set", *(path.parent for path in paths)]


@pytest.mark.parametrize(
    "ids", [None, [f"{n * 7 % 24:02d}x" for n in range(24)], ["b", None, "", *"cdefghijklmnopqrstuvw"]]
)
def test_one_content_has_the_same_ids_and_gives_the_same_choice_in_every_form(tmp_path, monkeypatch, ids):
    texts = [f"Ship {n} sailed past the old mill." for n in range(24)]
    frame = pd.DataFrame({"text": texts} if ids is None else {"id": ids, "text": texts})
    expected = [id or f"train#{n + 1}" for n, id in enumerate(ids or [None] * 24)]
    chosen = []
    for path in every_form(tmp_path, frame, monkeypatch):
        assert found(path, split="train") == list(zip(expected, texts, strict=True)), path
        parts = load_splits(str(path), heldout_fraction=0.4, progress=False)
        chosen.append([document.id for document in choose(parts.heldout, 3, 99, 1)])
    assert len(chosen[0]) == 3
    assert chosen.count(chosen[0]) == len(chosen)


def test_ids_that_occur_twice_are_refused_in_every_form(tmp_path, monkeypatch):
    frame = pd.DataFrame({"text": ["one", "two", "three"], "id": ["a", "b", "a"]})
    for path in every_form(tmp_path, frame, monkeypatch):
        with pytest.raises(
            PreskipError, match=r"(line|row|item) [34]: id 'a' is already that of (line|row|item) [12]: "
        ):
            load_corpus(str(path), progress=False)
    write(tmp_path / "parts/one.csv", frame[:2])
    write(tmp_path / "parts/two.csv", frame[1:])
    with pytest.raises(
        PreskipError, match=r"two\.csv, line 2: id 'b' is already that of corpus file .*one\.csv, line 3:"
    ):
        load_corpus(str(tmp_path / "parts"), progress=False)


def test_files_of_one_stem_keep_their_ids_apart(tmp_path):
    write(tmp_path / "a.json", pd.DataFrame({"text": ["one"]}))
    write(tmp_path / "a.jsonl", pd.DataFrame({"text": ["two"]}))
    assert found(tmp_path) == [("a.json#1", "one"), ("a.jsonl#1", "two")]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    for shard, texts in (("b", ["three"]), ("a", ["one", "two"]), ("sub/c", ["four"])):
        write(tmp_path / f"{shard}.jsonl.gz", pd.DataFrame({"text": texts}))
    blob = (tmp_path / "sub/c.jsonl.gz").rename(tmp_path.parent / f"{tmp_path.name}-blob")
    (tmp_path / "sub/c.jsonl.gz").symlink_to(blob)  # as in the Hub's cache
    (tmp_path / "README.md").write_text("About the shards.")
    (tmp_path / "notes.json").write_text("{}")
    assert found(tmp_path) == [
        ("a#1", "one"),
        ("a#2", "two"),
        ("b#1", "three"),
        ("sub/c#1", "four"),
    ]
    linked = tmp_path.parent / f"{tmp_path.name}-link"
    linked.symlink_to(tmp_path)
    assert found(linked) == found(tmp_path)


def test_texts_of_a_folder_come_before_its_tables(tmp_path):
    write(tmp_path / "list.csv")
    (tmp_path / "a.txt").write_text("A text.")
    assert found(tmp_path) == [("a.txt", "A text.")]


def test_splits_of_a_folder_are_kept_apart(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "data" / f"{split}-00000-of-00001.parquet", pd.DataFrame({"text": [f"of {split}"]}))
    assert found(tmp_path) == [("data/train-00000-of-00001#1", "of train")]
    assert found(tmp_path, split="test") == [("data/test-00000-of-00001#1", "of test")]
    with pytest.raises(PreskipError, match="no split 'dev': choose one of train, test"):
        load_corpus(str(tmp_path), split="dev", progress=False)


def test_tables_that_are_left_out_are_told(tmp_path, capsys):
    for name in ("train-1.parquet", "other.parquet", "test-1.parquet", ".hidden/x.parquet"):
        write(tmp_path / name, pd.DataFrame({"text": [name]}))
    (tmp_path / "dataset_infos.json").write_text("{}")
    corpus = load_corpus(str(tmp_path))
    assert [document.text for document in corpus.documents] == ["train-1.parquet"]
    line = "1 table(s) of no split or of another format are left out, e.g. other.parquet"
    assert told(capsys) == f"corpus folder {tmp_path}: {line}\n"
    (tmp_path / "other.parquet").unlink()
    load_corpus(str(tmp_path))
    assert told(capsys) == ""


def test_a_folder_of_two_formats_tells_what_it_leaves(tmp_path, capsys):
    for name in ("a.csv", "b.csv", "c.parquet"):
        write(tmp_path / name, pd.DataFrame({"text": [name]}))
    assert [document.text for document in load_corpus(str(tmp_path)).documents] == ["a.csv", "b.csv"]
    assert "1 table(s) of no split or of another format are left out, e.g. c.parquet" in told(capsys)


def test_a_folder_that_would_be_a_pattern(tmp_path):
    write(tmp_path / "a[1]" / "sub" / "x.parquet")
    for folder in (tmp_path / "a[1]", tmp_path / "a[1]" / "sub"):
        with pytest.raises(PreskipError, match="in its name cannot be found: rename it"):
            load_corpus(str(folder), progress=False)


def test_a_run_inside_a_folder_of_tables_is_refused(tmp_path):
    write(tmp_path / "a.parquet", pd.DataFrame({"text": ["one"]}))
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "run.json").write_text('{"schema_version": 1, "config": {}}')
    (tmp_path / "runs" / "first" / "train.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(PreskipError, match=r"has tables and the run .*runs/first: give another --out, or move that"):
        load_corpus(str(tmp_path), progress=False)
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "README.md").write_text("A text.")
    assert found(tmp_path) == [("README.md", "A text.")]


def test_a_shard_without_rows_is_passed_over(tmp_path):
    write(tmp_path / "a.parquet", FRAME[:0])
    with pytest.raises(PreskipError, match=r"a\.parquet is empty: give one with text"):
        load_corpus(str(tmp_path / "a.parquet"), progress=False)
    write(tmp_path / "b.parquet", FRAME)
    assert found(tmp_path) == [(f"b#{row + 1}", text) for row, text in READ]


def test_saved_data_sets(tmp_path):
    whole = datasets.Dataset.from_pandas(FRAME, preserve_index=False)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select([5])}).save_to_disk(tmp_path / "two")
    expected = [(f"train#{row + 1}", text) for row, text in READ]
    assert found(tmp_path / "one") == found(tmp_path / "two") == expected
    assert found(tmp_path / "two", split="test") == [("test#1", "naïve")]
    with pytest.raises(PreskipError, match="no split 'dev': choose one of train, test"):
        load_corpus(str(tmp_path / "two"), split="dev", progress=False)
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(PreskipError, match="one cannot be read as saved data set, it may be damaged"):
        load_corpus(str(tmp_path / "one"), progress=False)


def test_json_may_name_groups(tmp_path):
    rows = [{"text": "one", "group": 7}, {"text": "two", "group": 7}, {"text": "three", "group": None}]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    groups = [document.group for document in load_corpus(str(path), progress=False).documents]
    assert groups[:2] == ["7", "7"]
    assert groups[2].startswith("text-")


@pytest.mark.parametrize(
    ("columns", "wanted", "expected"),
    [
        ({"title": "x", "content": "t"}, None, "t"),
        ({"n": 1, "body": "t"}, None, "t"),
        ({"a": "x", "b": "t"}, "b", "t"),
        ({"a": "x", "b": "y"}, None, "which column is the text? a, b hold strings: choose one with --text-column"),
        ({"a": "x", "b": "y"}, "c", "has no column 'c': it has a, b"),
        ({"a": 1, "b": 2}, None, "has no column of text: it has a, b"),
        ({"a": 1, "text": "y"}, "a", "column 'a' holds no text"),
    ],
)
@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl.gz"])
def test_columns(tmp_path, suffix, columns, wanted, expected):
    path = write(tmp_path / f"a.{suffix}", pd.DataFrame([columns] * 2))
    if len(expected) == 1:
        assert [text for _, text in found(path, text_column=wanted)] == [expected] * 2
        return
    with pytest.raises(PreskipError) as caught:
        load_corpus(str(path), text_column=wanted, progress=False)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_heading_that_is_a_question_is_the_column_that_is_asked_for(tmp_path):
    path = tmp_path / "survey.csv"
    path.write_text("Time,What did you like about it?\n9:00,The food.\n9:05,All of it.\n")
    question = "What did you like about it?"
    assert [text for _, text in found(path, text_column=question)] == ["The food.", "All of it."]
    for wanted in (None, "text"):
        with pytest.raises(PreskipError, match=r"if it is a name, rename the column, or name .* with --text-column"):
            load_corpus(str(path), text_column=wanted, progress=False)


def test_a_column_of_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "one", "id": "x"}\n')
    assert found(path, text_column="body") == [("x", "one")]
    assert found(path) == [("x", "one")]  # its only column of strings but for the id


def test_the_first_texts_may_be_missing(tmp_path):
    rows = 50
    frame = pd.DataFrame({"title": ["t"] * rows, "text": [None] * (rows - 1) + ["late"]})
    assert found(write(tmp_path / "a.parquet", frame)) == [(f"a#{rows}", "late")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.csv", b"", r"e\.csv is empty"),
        ("h.csv", b"text\n", r"h\.csv is empty"),
        ("n.csv", b"n,text\n1,\n2,\n", r"n\.csv is empty"),
        ("l.csv", "text\ncafé au lait\n".encode("latin-1"), r"l\.csv is not UTF-8"),
        ("r.csv", b'text\na\nb,"c\n', r"r\.csv cannot be read as csv"),
        ("x.parquet", b"", r"x\.parquet cannot be read as parquet"),
        ("x.arrow", b"PK", r"x\.arrow cannot be read as arrow"),
        ("x.json", b'{"text": ', r"x\.json cannot be read as json"),
        ("x.jsonl.gz", b"text", r"x\.jsonl\.gz cannot be read as json"),
        ("x.pdf.gz", gzip.compress(b"text", mtime=0), r"\.gz files are not read"),
    ],
)
def test_bad_files(tmp_path, name, content, message, capfd):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PreskipError, match=message) as caught:
        load_corpus(str(tmp_path / name), progress=False)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.csv.gz"])
def test_a_file_cut_short_is_named(tmp_path, name, capfd):
    frame = pd.DataFrame({"text": [f"{n} {hash(str(n))}" for n in range(2000)]})
    good = write(tmp_path / name, frame)
    bad = tmp_path / f"b-{name}"
    bad.write_bytes(good.read_bytes()[: good.stat().st_size * 2 // 3])
    with pytest.raises(PreskipError, match=f"b-{name} cannot be read as .*, it may be damaged or cut short") as caught:
        load_corpus(str(tmp_path), progress=False)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_folders_without_tables(tmp_path):
    with pytest.raises(PreskipError, match=r"no \.txt or \.md files and no tables"):
        load_corpus(str(tmp_path), progress=False)
    (tmp_path / "README.md").write_text("A text.")
    assert found(tmp_path) == [("README.md", "A text.")]
    write(tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: x\n  data_files: none.parquet\n---\n")
    with pytest.raises(PreskipError, match="cannot be read as data set"):
        load_corpus(str(tmp_path), progress=False)


def test_a_table_that_does_not_exist(tmp_path):
    for name in (tmp_path / "no.parquet", "folder/no.csv.gz"):
        with pytest.raises(PreskipError, match="does not exist: check the path"):
            load_corpus(str(name), progress=False)


@pytest.mark.parametrize(
    ("limit", "documents"),
    [
        (Limit(reason="r", documents=3), 3),
        (Limit(reason="r", characters=21), 3),  # nine each
        (Limit(reason="r", characters=28), 4),
        (Limit(reason="r", characters=21, least_documents=5), 5),
        (Limit(reason="r", characters=46, least_documents=2), 6),
    ],
)
def test_limits(tmp_path, limit, documents, capsys):
    path = write(tmp_path / "a.parquet", pd.DataFrame({"text": [f"naïve {n:03d}"[:9] for n in range(7)]}))
    corpus = load_corpus(str(path), limit=limit)
    assert [document.id for document in corpus.documents] == [f"a#{n + 1}" for n in range(documents)]
    assert not corpus.whole
    assert corpus.source.endswith(f", the first {documents} documents")
    line = f"corpus {path}: read the first {documents} documents ({9 * documents} characters) and left the rest: r\n"
    assert told(capsys) == line


def test_a_limit_that_leaves_nothing_is_not_told(tmp_path, capsys):
    path = write(tmp_path / "a.parquet")
    corpus = load_corpus(str(path), limit=Limit(reason="r", documents=5))
    assert (len(corpus.documents), corpus.whole) == (5, True)
    assert told(capsys) == f"corpus {path}: 2 of 7 rows have no text and are left out\n"
    splits = load_splits(str(path), limit=Limit(reason="r", documents=4), progress=False)
    assert (splits.whole, load_splits(str(path), progress=False).whole) == (False, True)
    assert told(capsys) == ""


def test_the_limit_of_hub_data_sets_is_told(monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    read = []

    def rows():
        for number in range(20_000):
            read.append(number)
            yield {"text": f"Text {number}."}

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows())
    corpus = load_corpus("some/set")
    assert len(corpus.documents) == HUB_LIMIT.documents == len(read) - 1
    words = "some/set: read the first 10,000 documents (98,890 characters) and left the rest: 10,000 docum"
    assert words in told(capsys)
    assert len(load_corpus("some/set", limit=Limit(reason="r", documents=20_000), progress=False).documents) == 20_000


def test_a_broken_stream_is_one_line(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def rows():
        yield from [{"text": "one"}] * 30
        raise ConnectionError("gone\naway")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows())
    with pytest.raises(PreskipError, match="the Hub cannot be reached"):
        load_corpus("some/set", progress=False)


def test_parquet_with_a_column_of_maps(tmp_path):
    kinds = pa.map_(pa.string(), pa.string())
    table = pa.table({"text": ["one text", "another"], "meta": pa.array([[("a", "b")], None], type=kinds)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [document.text for document in load_corpus(str(tmp_path / "a.parquet")).documents] == ["one text", "another"]


def test_a_process_that_stopped_early_ends_cleanly(tmp_path):
    path = write(tmp_path / "a.parquet", pd.DataFrame({"text": ["word " * 200] * 20_000}))
    pq.write_table(pq.read_table(path), path, row_group_size=500)
    code = (
        "from preskip.data.corpus import load_corpus; from preskip.data.tables import Limit; "
        f"print(len(load_corpus({str(path)!r}, limit=Limit(reason='', documents=30), progress=False).documents))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "30\n", "")


def test_names_of_tables_as_sets():
    assert [slug(name) for name in ("x/a.parquet", "a.jsonl.gz", "a.csv", "v1.gz")] == ["a", "a", "a", "v1.gz"]
