"""A corpus in three disjoint parts, from published files or by document."""

import json
import re
from collections import Counter

import pytest

from preskip.data.corpus import Document, clusters, load_corpus
from preskip.data.splits import _spread, choose, load_splits, load_texts, slug
from preskip.errors import PreskipError


def corpus(path, documents=40):
    rows = [{"id": f"d{i}", "text": f"Text number {i} of many.", "group": f"g{i // 2}"} for i in range(documents)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_parts_are_disjoint_by_group_and_do_not_depend_on_order(tmp_path):
    splits = load_splits(corpus(tmp_path / "texts.jsonl"), heldout_fraction=0.2, seed=3)
    parts = [splits.training, splits.development, splits.heldout]
    groups = [{document.group for document in part} for part in parts]
    assert sum(map(len, parts)) == 40
    assert sum(map(len, groups)) == len(set.union(*groups)) == 20
    assert len(splits.heldout) == 8
    assert splits.development
    lines = (tmp_path / "texts.jsonl").read_text().splitlines()
    (tmp_path / "turned.jsonl").write_text("\n".join(reversed(lines)) + "\n")
    turned = load_splits(str(tmp_path / "turned.jsonl"), heldout_fraction=0.2, seed=3)
    assert [d.id for d in turned.heldout] == [d.id for d in splits.heldout]
    assert turned.sha256 == splits.sha256


def test_published_parts_are_taken_as_they_are(tmp_path):
    folder = tmp_path / "wikitext2"
    folder.mkdir()
    for name, title in (
        ("wiki.train.tokens.shuffled_articles", "Train"),
        ("wiki.valid.tokens", "Valid"),
        ("wiki.test.raw", "Test"),
    ):
        pages = "".join(f" \n = {title} {i} = \n \n Text {i} of it . \n" for i in range(3))
        (folder / name).write_text(pages)
    splits = load_splits("wikitext2", data_dir=tmp_path)
    assert [document.id for document in splits.heldout] == ["0000 Test 0", "0001 Test 1", "0002 Test 2"]
    assert all("Valid" in document.text for document in splits.development)
    assert len(splits.training) == 3
    (folder / "wiki.valid.tokens").unlink()
    with pytest.raises(PreskipError, match=r"wiki\.valid\.tokens is missing"):
        load_splits("wikitext2", data_dir=tmp_path)
    with pytest.raises(PreskipError, match="give --data-dir"):
        load_splits("books")


def write_books(directory, paragraphs):
    def books(first, count):
        return "\n\n\n\n".join(
            "\n\n".join(f"Paragraph {i} of book {book}. {'Words of it. ' * 300}" for i in range(paragraphs))
            for book in range(first, first + count)
        )

    folder = directory / "books"
    folder.mkdir()
    (folder / "books_train.txt").write_text(books(0, 10))
    (folder / "books_valid.txt").write_text(books(10, 2))


def test_pieces_of_a_book_stay_together(tmp_path):
    write_books(tmp_path, 5)
    splits = load_splits("books", data_dir=tmp_path)
    assert len({d.group for d in splits.training}) == 9
    assert {d.group for d in splits.development}.isdisjoint(d.group for d in splits.training)
    for part, first in ((splits.training, 0), (splits.development, 0), (splits.heldout, 10)):
        for document in part:
            book = int(re.match(r"Paragraph \d of book (\d+)", document.text)[1])
            assert document.group.split("-book-")[1] == str(book - first)
    assert len(splits.heldout) > len({d.group for d in splits.heldout}) == 2


def test_every_fourth_book_is_held_out_too(tmp_path):
    write_books(tmp_path, 20)
    splits = load_splits("books24", data_dir=tmp_path)
    sizes = Counter(document.group for document in splits.heldout)
    assert set(sizes) == {"training-book-3", "training-book-7", "heldout-book-0", "heldout-book-1"}
    assert set(sizes.values()) == {4}
    learned = {document.group for document in (*splits.training, *splits.development)}
    assert learned == {f"training-book-{book}" for book in (0, 1, 2, 4, 5, 6, 8, 9)}
    alone = load_texts("books24", data_dir=tmp_path).documents
    assert list(alone) == splits.heldout


def test_the_pieces_of_a_long_book_are_spread_over_it():
    pieces = [Document(f"{place:02}", "", "long") for place in range(40)] + [Document("s", "", "short")]
    assert [piece.id for piece in _spread(pieces)] == ["05", "15", "25", "35", "s"]


def test_choose_is_fixed_and_keeps_white_space(tmp_path):
    splits = load_splits(corpus(tmp_path / "texts.jsonl"))
    chosen = choose(splits.training, 5, 3, seed=1)
    assert [document.id for document in chosen] == [document.id for document in choose(splits.training, 5, 3, seed=1)]
    assert all(document.text == f"Text number {document.id[1:]}" for document in chosen)
    assert len(choose(splits.heldout, 1000, 3, seed=1)) == len(splits.heldout)


def test_no_long_book_stands_for_all():
    pieces = [
        Document(f"{book}-{piece:02}", "a b c", book) for book in "abcd" for piece in range(40 if book == "b" else 3)
    ]
    counted = Counter(document.group for document in choose(pieces, 8, 3, seed=1))
    assert counted == dict.fromkeys("abcd", 2)
    assert Counter(document.group for document in choose(pieces, 20, 3, seed=1)) == {"a": 3, "b": 11, "c": 3, "d": 3}
    assert len({document.group for document in choose(pieces, 3, 3, seed=1)}) == 3
    assert {document.id for document in choose(pieces, 8, 3, 1)} != {
        document.id for document in choose(pieces, 8, 3, 2)
    }


def test_documents_of_one_group_are_a_cluster():
    assert clusters([Document(str(place), "", group) for place, group in enumerate("abacb")]) == [0, 1, 0, 2, 1]
    assert clusters([Document(str(place), "", "a") for place in range(3)]) == [0, 1, 2]


def test_pieces_of_one_text_are_split_and_count_as_one(tmp_path):
    """A text file has no other documents: they are on every side, and one unit where they are scored."""
    path = tmp_path / "novel.txt"
    paragraphs = [f"Paragraph {number}. " + "word " * 900 for number in range(40)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    splits = load_splits(str(path))
    assert [len(part) for part in (splits.training, splits.development, splits.heldout)] == [14, 2, 4]
    assert {document.group for document in choose(splits.heldout, 4, 50, 0)} == {"novel"}
    assert {document.group for document in load_texts(str(path)).documents} == {"novel"}
    # Documents that the file itself keeps apart are independent, and which pieces are held out does not depend on it.
    path.write_text("\f".join(document.text for document in load_corpus(str(path)).documents), encoding="utf-8")
    again = load_splits(str(path))
    assert [document.id for document in again.heldout] == [document.id for document in splits.heldout]
    assert again.sha256 == splits.sha256
    assert len({document.group for document in choose(again.heldout, 4, 50, 0)}) == 4


def test_slug():
    assert slug("../data/my texts.jsonl") == "my-texts"
    assert slug("owner/name:config") == "name-config"
    assert slug("sotu") == "sotu"
    assert slug("v1.5") == "v1.5"
