"""Packed blocks hold the documents' tokens and no others; windows score every token exactly once."""

import copy
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from tokenizers.normalizers import Lowercase

from preskip.data.blocks import (
    Marks,
    heldout_windows,
    keeps,
    opening_token,
    pack_blocks,
    scored_size,
    text_ids,
    token_stream,
)
from preskip.data.corpus import Document, split_text
from preskip.errors import PreskipError
from tiny_text import PROSE, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
DOCUMENTS = [Document(f"d{i}", f"Document number {i}. " + PROSE, f"d{i}") for i in range(6)]
EOS = TOKENIZER.eos_token_id
END = Marks(start=None, end=EOS)


def test_one_document_is_its_tokens_in_order():
    ids = [*text_ids(PROSE, TOKENIZER), EOS]
    blocks = pack_blocks([Document("d", PROSE, "d")], TOKENIZER, len(ids))
    assert blocks.dtype == np.int32
    assert blocks.tolist() == [ids]


def test_a_tokenizer_keeps_a_text_but_for_space_and_forms_of_a_character():
    assert keeps(TOKENIZER, "A Zebra, ﬁne 😀\n\n  two\tlines ")
    lower = copy.deepcopy(TOKENIZER)
    lower.backend_tokenizer.normalizer = Lowercase()
    assert keeps(lower, "a zebra")
    assert not keeps(lower, "a Zebra")


def test_blocks_hold_every_document_once():
    # With blocks of 16 the concatenation can be recovered from the first tokens of the shuffled documents.
    streams = {document.id: [*text_ids(document.text, TOKENIZER), EOS] for document in DOCUMENTS}
    total = sum(map(len, streams.values()))
    blocks = pack_blocks(DOCUMENTS, TOKENIZER, 16)
    assert blocks.shape == (total // 16, 16)
    assert int((blocks == EOS).sum()) in (5, 6)  # the last one may fall into the dropped rest
    whole = sorted(token for stream in streams.values() for token in stream)
    dropped = total - blocks.size
    counts = np.bincount(whole) - np.bincount(blocks.ravel(), minlength=max(whole) + 1)
    assert counts.min() >= 0
    assert counts.sum() == dropped < 16


def test_seed_and_order():
    blocks = pack_blocks(DOCUMENTS, TOKENIZER, 32, seed=5)
    assert np.array_equal(blocks, pack_blocks(DOCUMENTS[::-1], TOKENIZER, 32, seed=5))
    assert not np.array_equal(blocks, pack_blocks(DOCUMENTS, TOKENIZER, 32, seed=6))


def test_no_separator_where_there_is_none():
    bare = tiny_tokenizer(bos=False, eos=False)
    total = sum(len(text_ids(document.text, bare)) for document in DOCUMENTS)
    assert pack_blocks(DOCUMENTS, bare, total).shape == (1, total)


@pytest.mark.parametrize("lead", [False, True])
def test_the_tokenizers_own_start_token_is_not_added(lead):
    tokenizer = tiny_tokenizer(lead=lead)
    assert tokenizer.bos_token_id not in pack_blocks(DOCUMENTS, tokenizer, 32)
    assert opening_token(tokenizer) == (tokenizer.bos_token_id if lead else None)
    assert opening_token(tiny_tokenizer(bos=False)) is None


@pytest.mark.parametrize("limit", [None, 200])
def test_every_block_begins_with_the_opening_token(limit):
    """Behind it the blocks of a text are those of one token less."""
    own = {"seed": 5, "limit_tokens": limit}
    blocks = pack_blocks(DOCUMENTS, TOKENIZER, 32, opening=7, **own)
    assert blocks.shape[1] == 32
    assert set(blocks[:, 0]) == {7}
    if limit is not None:
        assert len(blocks) == limit // 32
        own["limit_tokens"] = len(blocks) * 31
    assert np.array_equal(blocks[:, 1:], pack_blocks(DOCUMENTS, TOKENIZER, 31, **own))


def test_limit_tokenises_no_more_than_needed():
    calls = []

    class Counting:
        eos_token_id, bos_token_id, sep_token_id = EOS, None, None

        def __call__(self, text, **options):
            calls.append(text)
            return TOKENIZER(text, **options)

    assert pack_blocks(DOCUMENTS, Counting(), 32, limit_tokens=100).shape == (3, 32)
    assert len(calls) == 1
    assert pack_blocks(DOCUMENTS, Counting(), 32, limit_tokens=10**9).shape[0] > 30


def in_memory(documents, tokenizer, seq_len, limit_tokens=None, seed=0, piece_characters=None):
    """Text by text, everything in memory."""
    random = np.random.default_rng(seed)
    texts = [document.text for document in sorted(documents, key=lambda document: document.id)]
    if piece_characters is not None:
        texts = [piece for text in texts for piece in split_text(text, piece_characters)]
    stream = []
    for index in random.permutation(len(texts)):
        ids = tokenizer(texts[index], add_special_tokens=False)["input_ids"]
        stream += [*ids, tokenizer.eos_token_id] if ids else []
        if limit_tokens is not None and len(stream) >= limit_tokens // seq_len * seq_len:
            break
    end = len(stream) if limit_tokens is None else min(len(stream), limit_tokens)
    blocks = np.asarray(stream[: end // seq_len * seq_len], dtype=np.int32).reshape(-1, seq_len)
    return blocks[random.permutation(len(blocks))]


LONG = [Document(f"d{i % 7}-{i}", ("", "Short.", PROSE * 3, f"No. {i}: {PROSE}")[i % 4], f"d{i}") for i in range(30)]


@pytest.mark.parametrize("limit", [None, 1000, 4096, 10**9])
@pytest.mark.parametrize("pieces", [None, 300])
@pytest.mark.parametrize("characters", [1, 2000, 10**9])
def test_blocks_are_those_of_tokenising_in_memory(monkeypatch, limit, pieces, characters):
    monkeypatch.setattr("preskip.data.blocks.BATCH_CHARACTERS", characters)
    blocks = pack_blocks(LONG, TOKENIZER, 32, limit_tokens=limit, seed=3, piece_characters=pieces)
    assert blocks.dtype == np.int32
    assert np.array_equal(blocks, in_memory(LONG, TOKENIZER, 32, limit, 3, pieces))


def test_memory_does_not_grow_with_the_text(monkeypatch):
    monkeypatch.setattr("preskip.data.blocks.BATCH_CHARACTERS", 2**12)
    documents = [Document(f"d{i}", PROSE, f"d{i}") for i in range(1_000)]
    pack_blocks(documents[:10], TOKENIZER, 64)  # what is loaded and kept at the first call
    tracemalloc.start()
    blocks = pack_blocks(documents, TOKENIZER, 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert blocks.nbytes > 1_300_000
    assert peak < blocks.nbytes / 2  # in memory it takes 3.1 times their size


class Recording:
    """The tiny tokenizer, with what it was given at each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, texts, **options):
        self.calls.append(texts)
        return TOKENIZER(texts, **options)


def test_batches_of_texts_are_bounded_and_whole():
    tokenizer = Recording()
    stream = list(token_stream(["ab", "c", "", "defghi", "j", "k"], tokenizer, END, 3))
    assert tokenizer.calls == [["ab", "c", ""], ["defghi"], ["j", "k"]]
    assert [done for done, _ in stream] == [3, 4, 6]
    assert stream[0][1] == [*text_ids("ab", TOKENIZER), EOS, *text_ids("c", TOKENIZER), EOS, EOS]
    assert list(token_stream([], tokenizer, END, 3)) == []


def test_a_long_text_is_tokenised_in_parts(monkeypatch):
    """Its tokens are those of the whole text, cut behind words."""
    monkeypatch.setattr("preskip.data.blocks.LONGEST_TEXT", 100)
    long = PROSE * 5
    tokenizer = Recording()
    stream = list(token_stream(["Short.", long, "Short."], tokenizer, END, 250))
    parts = [text for call in tokenizer.calls for text in call]
    assert "".join(parts) == f"Short.{long}Short."
    assert max(map(len, parts)) <= 100
    assert max(sum(map(len, call)) for call in tokenizer.calls) <= 250
    assert all(before[-1].isalpha() and after[0].isspace() for before, after in pairwise(parts[1:-1]))
    short = [*text_ids("Short.", TOKENIZER), EOS]
    assert [id for _, ids in stream for id in ids] == [*short, *text_ids(long, TOKENIZER), EOS, *short]
    assert [done for done, _ in stream][-1] == 3


def test_a_long_text_without_spaces_is_cut_all_the_same(monkeypatch):
    monkeypatch.setattr("preskip.data.blocks.LONGEST_TEXT", 100)
    tokenizer = Recording()
    (_, ids), *more = token_stream(["abcdefghij" * 25], tokenizer, Marks(None, None), 1000)
    assert [[len(part) for part in call] for call in tokenizer.calls] == [[100, 100, 50]]
    assert not more
    assert TOKENIZER.decode(ids) == "abcdefghij" * 25


def test_pieces_draw_on_many_documents():
    texts = [Document(f"d{i}", "\n\n".join([f"{chr(65 + i)}" * 40] * 20), f"d{i}") for i in range(8)]
    few = pack_blocks(texts, TOKENIZER, 32, limit_tokens=960)
    many = pack_blocks(texts, TOKENIZER, 32, limit_tokens=960, piece_characters=80)
    letters = [set(TOKENIZER.decode(blocks.ravel().tolist())) & set("ABCDEFGH") for blocks in (few, many)]
    assert few.shape == many.shape == (30, 32)
    assert len(letters[0]) < len(letters[1])


def test_progress_reaches_its_total():
    from rich.progress import Progress

    with Progress(disable=True) as bar:
        pack_blocks(DOCUMENTS, TOKENIZER, 32, progress=bar)
        pack_blocks(DOCUMENTS, TOKENIZER, 32, limit_tokens=100, progress=bar)
        assert [(task.completed, task.total) for task in bar.tasks] == [(6, 6), (96, 96)]


def test_too_small():
    with pytest.raises(PreskipError, match=r"do not fill one batch of 8 × 1000"):
        pack_blocks(DOCUMENTS, TOKENIZER, 1000, min_blocks=8)
    with pytest.raises(PreskipError, match=r"too small: 0 training tokens do not fill one block of 16; .* the seq"):
        pack_blocks([], TOKENIZER, 16)
    with pytest.raises(PreskipError, match="limit of 10 tokens"):
        pack_blocks(DOCUMENTS, TOKENIZER, 16, limit_tokens=10)
    with pytest.raises(PreskipError, match="sequence length 1"):
        pack_blocks(DOCUMENTS, TOKENIZER, 1)


@pytest.mark.parametrize("context_length", [1, 2, 7, 32, 10_000])
@pytest.mark.parametrize("stride_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("start", [True, False])
def test_windows_score_each_token_once(context_length, stride_share, start):
    tokenizer = tiny_tokenizer(bos=start, eos=start)
    stride = max(1, round(stride_share * context_length))
    ids = text_ids(PROSE, tokenizer)
    windows = heldout_windows(Document("d", PROSE, "d"), tokenizer, context_length, stride)
    scored = [token for window in windows for token in window.input_ids[window.scored_from :]]
    assert scored == (ids if start else ids[1:])
    full = [tokenizer.bos_token_id, *ids] if start else ids
    position = 1
    for index, (input_ids, scored_from) in enumerate(windows):
        assert 1 <= scored_from < len(input_ids) <= context_length + 1
        # What precedes is the text's own past, as long as fits.
        end = position + len(input_ids) - scored_from
        assert list(input_ids) == full[max(0, end - context_length - 1) : end]
        if index > 0:
            assert scored_from >= context_length - stride + 1
        position = end


def test_every_window_begins_with_a_start_token_that_opens_every_text():
    """In place of its first token: a model that was trained so may be lost without."""
    plain, opening = tiny_tokenizer(), tiny_tokenizer(lead=True)
    document = Document("d", PROSE, "d")
    for stride in (3, 8):
        windows = heldout_windows(document, opening, 8, stride)
        assert {window.input_ids[0] for window in windows} == {opening.bos_token_id}
        before = heldout_windows(document, plain, 8, stride)
        assert [list(window.input_ids[1:]) for window in windows] == [list(w.input_ids[1:]) for w in before]
        assert [window.scored_from for window in windows] == [window.scored_from for window in before]
        assert heldout_windows(document, opening, 8, stride, reopen=False) == before


def test_windows_of_nothing_and_bad_stride():
    assert heldout_windows(Document("d", "", "d"), TOKENIZER, 8, 8) == []
    for context_length, stride in ((0, 1), (8, 0), (8, 9)):
        with pytest.raises(PreskipError, match="stride must lie between"):
            heldout_windows(DOCUMENTS[0], TOKENIZER, context_length, stride)


def test_scored_size():
    document = Document("d", "Café — naïve\n\nmorning", "d")
    assert scored_size(document, TOKENIZER) == (len("Café — naïve\n\nmorning".encode()), 4)
    bare = tiny_tokenizer(bos=False, eos=False)
    first = bare.decode(text_ids(document.text, bare)[:1])
    assert scored_size(document, bare).bytes == len(document.text.encode()) - len(first.encode())
    assert scored_size(Document("d", "", "d"), bare) == (0, 0)
