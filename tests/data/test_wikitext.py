"""WikiText by page, from text and from rows that are lines, as the Hub has it."""

import datasets
import pandas as pd
import pytest

from local_data import WIKI
from preskip.data.corpus import load_corpus
from preskip.data.local import data_directory
from preskip.data.splits import load_splits, load_texts
from preskip.data.wikitext import is_wikitext, join_pages, page_title, wikitext_pages

REAL = data_directory()


def hub_rows(text: str) -> list[str]:
    """The rows that the Hub's data set makes of a file: lines with their ends, blank ones empty."""
    return ["" if not line.strip() else f"{line}\n" for line in text.removesuffix("\n").split("\n")]


def test_pages_are_cut_at_titles_and_nothing_is_lost():
    pages = wikitext_pages(WIKI)
    assert len(pages) == 2
    assert "A section" in pages[0]
    assert "".join("\n".join(pages).split()) == "".join(WIKI.split())
    assert page_title(" = Robert Boulter = ") == "Robert Boulter"
    assert page_title(" = = Career = = ") is None
    assert page_title(" = = = 2000 – 2005 = = = ") is None
    assert page_title("a = b") is None
    assert page_title("") is None


def test_rows_give_the_pages_of_the_text():
    rows = hub_rows(WIKI)
    joined = list(join_pages(enumerate(rows)))
    assert [(start, title) for start, title, _ in joined] == [(1, "First page"), (9, "Second ( page )")]
    for (_, _, page), expected in zip(joined, wikitext_pages(WIKI), strict=True):
        assert [line.strip() for line in page.strip().split("\n")] == [x.strip() for x in expected.strip().split("\n")]


@pytest.mark.skipif(REAL is None, reason="the data directory is not there (PRESKIP_DATA)")
def test_the_real_test_text_gives_its_62_pages(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    rows = hub_rows((REAL / "wikitext2/wiki.test.raw").read_text(encoding="utf-8"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: iter([{"text": row} for row in rows]))
    by_row = sorted(load_corpus("Salesforce/wikitext", progress=False).documents, key=lambda document: document.id)
    pages = load_texts("wikitext2", data_dir=REAL).documents
    assert len(by_row) == len(pages) == 62
    for own, page in zip(by_row, pages, strict=True):
        assert own.text.split() == page.text.split()
        assert own.id.split(" ", 1)[1] == page.id.split(" ", 1)[1]


def test_a_table_of_lines_is_split_by_page_in_the_order_of_its_rows(tmp_path):
    words = [
        f" = Page {n} = \n \n It is page {n} . \n More of {n} . \n \n = = Part = = \n Yet more . \n" for n in range(30)
    ]
    pd.DataFrame({"text": hub_rows("".join(words))}).to_parquet(tmp_path / "lines.parquet")
    corpus = load_corpus(str(tmp_path / "lines.parquet"), progress=False)
    ordered = sorted(corpus.documents, key=lambda document: document.id)
    assert [document.text.split("\n")[0].strip() for document in ordered] == [f"= Page {n} =" for n in range(30)]
    splits = load_splits(str(tmp_path / "lines.parquet"), progress=False)
    assert len(splits.heldout) == 6
    for document in (*splits.training, *splits.development, *splits.heldout):
        assert document.text.count("= Page") == 1
        assert document.text.count("Yet more") == 1


def test_pages_go_on_in_the_next_file_of_a_split(tmp_path):
    words = [f" = Page {n} = \n \n It is page {n} . \n \n = = Part = = \n" + " More . \n" * 30 for n in range(5)]
    rows = hub_rows("".join(words))
    (tmp_path / "shards").mkdir()
    for number in range(4):  # all but the first begin inside a page
        part = rows[number * 39 : (number + 1) * 39 if number < 3 else None]
        pd.DataFrame({"text": part}).to_parquet(tmp_path / f"shards/train-{number}.parquet")
    pd.DataFrame({"text": rows}).to_parquet(tmp_path / "whole.parquet")
    sharded = load_corpus(str(tmp_path / "shards"), progress=False).documents
    whole = load_corpus(str(tmp_path / "whole.parquet"), progress=False).documents
    assert [document.text for document in sharded] == [document.text for document in whole]
    assert [document.id for document in sharded] == [
        "train-0#00000000 Page 0",
        "train-0#00000035 Page 1",
        "train-1#00000031 Page 2",
        "train-2#00000027 Page 3",
        "train-3#00000023 Page 4",
    ]


def test_other_rows_behind_pages_end_the_last_one(tmp_path):
    pd.DataFrame({"text": hub_rows(" = Page = \n \n Its text . \n")}).to_parquet(tmp_path / "train-0.parquet")
    pd.DataFrame({"text": ["Two\nlines", "one"]}).to_parquet(tmp_path / "train-1.parquet")
    found = load_corpus(str(tmp_path), progress=False).documents
    assert [document.text for document in found] == [" = Page = \n\n Its text . \n", "Two\nlines", "one"]


def test_a_text_file_of_wikitext_is_cut_at_its_pages(tmp_path):
    (tmp_path / "wiki.raw.txt").write_text(WIKI, encoding="utf-8")
    documents = load_corpus(str(tmp_path / "wiki.raw.txt")).documents
    assert [document.text.strip().split("\n")[0].strip() for document in documents] == [
        "= First page =",
        "= Second ( page ) =",
    ]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        ["", None],
        ["A line.", " = Title = \n"],
        [" = Title = \nand text in the same row", "more"],
        [" = = Section = = \n", "text"],
        [3, "text"],
    ],
)
def test_other_rows_stay_documents_of_their_own(rows):
    assert not is_wikitext(rows)


def test_rows_before_the_first_title_and_missing_ones_are_kept_apart():
    assert is_wikitext([None, "", " = T = \n", "a"])
    rows = [(4, "end of a page\n"), (5, None), (6, " = T = \n"), (7, "a")]
    assert list(join_pages(rows)) == [(4, "", "end of a page\n\n"), (6, "T", " = T = \na\n")]
    assert list(join_pages([(0, ""), (1, None)])) == []
