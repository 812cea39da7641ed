import hashlib
from types import SimpleNamespace

import numpy as np
import pytest

from preskip.data.blocks import document_marks, start_token, token_stream
from preskip.data.corpus import Document
from preskip.data.packed import open_blocks, read_record, write_packed
from preskip.errors import PreskipError
from tiny_text import PROSE, tiny_tokenizer

BOS, EOS = 0, 1  # of the tiny tokenizer
DOCUMENTS = [Document(f"d{i}", f"Record {i}. {PROSE}", f"d{i}") for i in range(5)]


LONG = [Document(f"d{i:02d}", ("", "Short.", PROSE * 3, PROSE)[i % 4], f"d{i}") for i in range(20)]


@pytest.mark.parametrize("characters", [1, 3000])
def test_the_file_does_not_depend_on_how_many_texts_are_tokenised_at_once(tokenizer, tmp_path, monkeypatch, characters):
    monkeypatch.setattr("preskip.data.packed.BATCH_CHARACTERS", characters)
    done = []
    record = write_packed(tmp_path, LONG, tokenizer, seed=1, advance=lambda count, note: done.append(count))
    order = np.random.default_rng(1).permutation(len(LONG))
    expected = [id for i in order for id in [BOS, *tokenizer(LONG[i].text)["input_ids"], EOS]]
    assert np.fromfile(tmp_path / "tokens.bin", dtype="<u2").tolist() == expected
    assert record.tokens == len(expected)
    assert done[-1] == len(LONG)
    assert len(done) > 3


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_the_file_is_the_documents_in_a_seeded_order_each_between_its_marks(tokenizer, tmp_path):
    record = write_packed(tmp_path, DOCUMENTS[::-1], tokenizer, seed=3)
    order = np.random.default_rng(3).permutation(5)
    expected = [id for i in order for id in [BOS, *tokenizer(DOCUMENTS[i].text)["input_ids"], EOS]]
    stored = np.fromfile(tmp_path / "tokens.bin", dtype="<u2")
    assert stored.tolist() == expected
    assert (record.tokens, record.documents, record.dtype) == (len(expected), 5, "<u2")
    assert record.sha256 == hashlib.sha256((tmp_path / "tokens.bin").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("special", "opening", "closing"),
    [
        ({"bos": BOS, "eos": EOS}, [BOS], [EOS]),
        ({"bos": EOS, "eos": EOS}, [], [EOS]),
        ({"eos": EOS}, [], [EOS]),
        ({"bos": BOS}, [], [BOS]),
        ({"cls": BOS, "sep": EOS}, [], [BOS]),
        ({}, [], []),
    ],
)
def test_documents_open_as_they_are_scored(tokenizer, tmp_path, special, opening, closing):
    """In training the token in front of a document's text is that of scoring: its own, or the end of the one before."""
    given = SimpleNamespace(**{f"{kind}_token_id": special.get(kind) for kind in ("bos", "eos", "cls", "sep")})
    marks = document_marks(given)
    assert [token for token in marks if token is not None] == [*opening, *closing]
    (_, stream), *_ = token_stream(["One.", "Two."], tokenizer, marks, 1000)
    texts = [tokenizer(text)["input_ids"] for text in ("One.", "Two.")]
    assert stream == [*opening, *texts[0], *closing, *opening, *texts[1], *closing]
    before = stream[: len(stream) - len(texts[1]) - len(closing)][-1]
    assert start_token(given) in (before, None)


def test_a_document_in_parts_has_one_start_and_one_end(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("preskip.data.blocks.LONGEST_TEXT", 100)
    write_packed(tmp_path, DOCUMENTS[:1], tokenizer)
    stored = np.fromfile(tmp_path / "tokens.bin", dtype="<u2").tolist()
    assert stored == [BOS, *tokenizer(DOCUMENTS[0].text)["input_ids"], EOS]


def test_blocks_are_mapped_and_the_rest_is_left_out(tokenizer, tmp_path):
    record = write_packed(tmp_path, DOCUMENTS, tokenizer)
    blocks = open_blocks(tmp_path, 32)
    assert isinstance(blocks.base, np.memmap) or isinstance(blocks, np.memmap)
    assert not blocks.flags.writeable
    assert blocks.shape == (record.tokens // 32, 32)
    assert blocks.ravel().tolist() == np.fromfile(tmp_path / "tokens.bin", dtype="<u2")[: blocks.size].tolist()


def test_a_large_vocabulary_takes_four_bytes(tokenizer, tmp_path):
    class Large:
        """The tiny tokenizer with ids that two bytes cannot hold."""

        bos_token_id = eos_token_id = 70_000

        def __len__(self):
            return 70_001

        def get_vocab(self):
            return tokenizer.get_vocab()

        def __call__(self, texts, **options):
            return tokenizer(texts, **options)

    assert write_packed(tmp_path, DOCUMENTS, Large()).dtype == "<u4"
    assert 70_000 in open_blocks(tmp_path, 8)


def test_what_is_there_is_kept_unless_texts_or_tokenizer_changed(tokenizer, tmp_path):
    first = write_packed(tmp_path, DOCUMENTS, tokenizer)
    written = (tmp_path / "tokens.bin").stat().st_mtime_ns
    assert write_packed(tmp_path, DOCUMENTS, tokenizer) == first
    assert (tmp_path / "tokens.bin").stat().st_mtime_ns == written
    assert write_packed(tmp_path, DOCUMENTS[:4], tokenizer).documents == 4
    assert write_packed(tmp_path, DOCUMENTS[:4], tiny_tokenizer(eos=False)).tokenizer == first.tokenizer


def test_a_damaged_file_is_refused_and_written_again(tokenizer, tmp_path):
    first = write_packed(tmp_path, DOCUMENTS, tokenizer)
    content = bytearray((tmp_path / "tokens.bin").read_bytes())
    content[10] ^= 1
    (tmp_path / "tokens.bin").write_bytes(content)
    with pytest.raises(PreskipError, match=r"tokens.bin is damaged .*: delete .* and resume"):
        open_blocks(tmp_path, 32)
    assert write_packed(tmp_path, DOCUMENTS, tokenizer) == first
    assert open_blocks(tmp_path, 32).size
    (tmp_path / "tokens.bin").unlink()
    with pytest.raises(PreskipError, match="damaged"):
        open_blocks(tmp_path, 32)


def test_records_that_cannot_be_used(tokenizer, tmp_path):
    with pytest.raises(PreskipError, match="does not exist"):
        read_record(tmp_path)
    record = write_packed(tmp_path, DOCUMENTS[:1], tokenizer)
    with pytest.raises(PreskipError, match=f"{record.tokens} training tokens do not fill one block of 4096"):
        open_blocks(tmp_path, 4096)
    (tmp_path / "tokens.json").write_text('{"tokens": 1}')
    with pytest.raises(PreskipError, match="another version"):
        read_record(tmp_path)
