"""Texts as the windows that the model reads, against the tokens of the whole text."""

import pytest

from preskip.analysis.explain.classes import Frequencies
from preskip.analysis.explain.reading import Text, chunks
from preskip.data.blocks import text_ids
from tiny_text import PROSE, tiny_tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "first", "later"),
    [
        (tiny_tokenizer(), [0], []),
        (tiny_tokenizer(lead=True), [0], [0]),  # such a model may be lost without
        (tiny_tokenizer(bos=False, eos=False), [], []),
    ],
)
def test_windows_follow_each_other_behind_their_start_tokens(tokenizer, first, later):
    ids = text_ids(PROSE, tokenizer)
    texts = [Text("a", "a", PROSE)]
    found = list(chunks(texts, tokenizer, Frequencies([PROSE], tokenizer), context_length=8, counted="held-out"))
    assert len(found) > 3
    assert [token for chunk in found for token in chunk.ids[chunk.lead :]] == ids
    for number, chunk in enumerate(found):
        lead = later if number else first
        own = chunk.ids[len(lead) :]
        assert chunk.ids[: len(lead)] == lead
        assert chunk.lead == len(lead)
        assert len(chunk.ids) == 8 or chunk is found[-1]
        assert own == ids[chunk.begin : chunk.begin + len(own)]
        behind = ids[chunk.begin + len(own) : chunk.begin + len(own) + 1]
        assert chunk.targets == [*chunk.ids, *behind][1:]
