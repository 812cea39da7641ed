"""Texts as evaluation sets: every document's nats, and the description that goes with them."""

import pytest

from preskip.data.corpus import Document
from preskip.errors import PreskipError
from preskip.evaluate.likelihood import document_windows, score_sequences
from preskip.evaluate.texts import TextSuite, prepare_texts
from preskip.stats.comparisons import compare
from preskip.stats.verdicts import independent_units
from tiny_model import tiny_llama, write_corpus
from tiny_text import PROSE, tiny_tokenizer


@pytest.fixture
def corpora(tmp_path):
    (tmp_path / "prose.txt").write_text(PROSE)
    return [str(write_corpus(tmp_path / "records.jsonl", 5)), str(tmp_path / "prose.txt")]


@pytest.mark.parametrize("stride", [None, 9])
def test_records_and_sets(corpora, stride):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    suite = TextSuite(corpora, tokenizer, context_length=32, stride=stride)
    seen = []
    records = suite.score(model, advance=lambda done, note: seen.append(done))
    assert seen[-1] == suite.size
    assert list(suite.sets) == ["records", "prose"]
    assert [record["set"] for record in records] == 5 * ["records"] + ["prose"]
    for name, described in suite.sets.items():
        own = [record for record in records if record["set"] == name]
        assert (described["context_length"], described["stride"]) == (32, stride or 32)
        assert described["documents"] == len(own)
        for size in ("tokens", "bytes", "words"):
            assert described[size] == sum(record[size] for record in own)
    windows, _ = document_windows(
        [Document("p", PROSE.strip("\n"), "p")], tokenizer, context_length=32, stride=stride or 32
    )
    expected = sum(score.nll for score in score_sequences(model, windows, batch_tokens=1))
    assert records[-1]["nll"] == pytest.approx(expected, abs=1e-3)


def test_pieces_of_one_text_are_one_cluster(tmp_path):
    (tmp_path / "novel.txt").write_text("\n\n".join(f"{number} {PROSE}" for number in range(40)))
    suite = TextSuite([str(tmp_path / "novel.txt")], tiny_tokenizer(), context_length=32, limit=2)
    described = suite.sets["novel"]
    assert (described["documents"], described["clusters"]) == (2, 1)
    assert "unit_freedom" not in described
    assert "they count as one, and no verdict is given" in described["notes"][0]
    records = suite.score(tiny_llama())
    assert {record["cluster"] for record in records} == {"novel"}
    (comparison,) = compare(records, [{**record, "nll": 2 * record["nll"]} for record in records])
    assert independent_units(comparison) == 1


def test_a_sample_is_seeded(corpora):
    def ids(seed):
        suite = TextSuite(corpora[:1], tiny_tokenizer(), context_length=32, limit=2, seed=seed)
        assert suite.sets["records"]["sample"] == {"of": 5, "seed": seed}
        return [record["id"] for record in suite.score(tiny_llama())]

    assert ids(0) == ids(0)
    assert len({tuple(ids(seed)) for seed in range(6)}) > 1


def test_two_texts_of_one_name_are_refused(corpora, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/prose.txt").write_text("Another text.")
    with pytest.raises(PreskipError, match="two texts are named 'prose'"):
        TextSuite([corpora[1], str(tmp_path / "other/prose.txt")], tiny_tokenizer(), context_length=32)


def test_of_a_published_corpus_the_held_out_part_is_scored(tmp_path):
    (tmp_path / "wikitext2").mkdir()
    pages = "\n = One = \n\n Some words . \n = Two = \n\n Other words . \n"
    (tmp_path / "wikitext2/wiki.test.raw").write_text(pages)  # the other parts are not needed
    suite = TextSuite(["wikitext2"], tiny_tokenizer(), context_length=32, data_dir=tmp_path)
    assert [record["id"] for record in suite.score(tiny_llama())] == ["0000 One", "0001 Two"]
    assert suite.sets["wikitext2"]["source"].startswith("WikiText-2")


def test_a_published_corpus_takes_the_data_directory():
    with pytest.raises(PreskipError, match="corpus books is read from the data directory: give --data-dir"):
        TextSuite(["books"], tiny_tokenizer(), context_length=32)


def test_a_set_says_where_later_windows_begin_with_the_start_token():
    """Scores of before have none there, and are not compared with these."""
    documents = [Document(name, PROSE, name) for name in "ab"]
    opening = tiny_tokenizer(lead=True)
    facts = {"domain": "in", "title": "t", "source": "s", "sha256": None}
    for tokenizer, length, reopen, expected in (
        (opening, 16, True, opening.bos_token_id),
        (opening, 16, False, None),
        (opening, 10_000, True, None),  # there is no later one
        (tiny_tokenizer(), 16, True, None),
    ):
        text = prepare_texts("t", documents, tokenizer, context_length=length, reopen=reopen)
        assert text.describe(tokenizer, **facts).get("reopened") == expected
