"""The paper's training blocks: which paragraphs, and how they are padded, cut and masked."""

import numpy as np
import pytest
import torch

from preskip.data.paragraphs import block_labels, paper_blocks, paper_paragraphs
from preskip.errors import PreskipError
from tiny_model import tiny_llama
from tiny_text import PROSE, tiny_tokenizer

LONG = "x" * 51
LINES = [part for part in PROSE.split("\n\n") if part]


def test_paragraphs_are_the_first_lines_of_more_than_fifty_characters():
    texts = [f" = Title = \n {LONG} \n\n short \n", "y" * 50, f"{'z' * 60}\n", LONG]
    assert paper_paragraphs(texts) == [f" {LONG} \n", "z" * 60 + "\n", LONG]
    assert paper_paragraphs(texts, count=2) == [f" {LONG} \n", "z" * 60 + "\n"]


def test_no_more_text_is_read_than_needed():
    def texts():
        yield from [LONG, LONG]
        raise AssertionError("read on")

    assert len(paper_paragraphs(texts(), count=2)) == 2


def test_blocks_hold_the_paragraph_then_padding():
    tokenizer = tiny_tokenizer()
    sizes = [len(tokenizer(text)["input_ids"]) for text in ("The harbor.", LINES[0])]
    assert sizes[0] < 20 < sizes[1]
    ids, mask = paper_blocks(["The harbor.", LINES[0]], tokenizer, 20)
    assert (ids.shape, mask.shape) == ((2, 20), (2, 20))
    assert mask.sum(1).tolist() == [sizes[0], 20]
    assert ids[0, : sizes[0]].tolist() == tokenizer("The harbor.")["input_ids"]
    assert set(ids[0, sizes[0] :].tolist()) == {tokenizer.eos_token_id}
    assert ids[1].tolist() == tokenizer(LINES[0])["input_ids"][:20]


def test_padding_adds_nothing_to_the_loss_or_its_gradient():
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    text = "The committee met on Monday."
    ids, mask = paper_blocks([text], tokenizer, 48)
    labels = block_labels(ids, mask)
    assert (labels == -100).sum() == 48 - len(tokenizer(text)["input_ids"])

    def gradients(**inputs):
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]

    bare = torch.tensor([tokenizer(text)["input_ids"]])
    expected = gradients(input_ids=bare, labels=bare)
    padded = gradients(
        input_ids=torch.from_numpy(ids.astype(np.int64)),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        labels=torch.from_numpy(labels),
    )
    assert padded[0] == pytest.approx(expected[0], rel=1e-5)
    for one, two in zip(padded[1], expected[1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_tokenizer_without_padding_or_end_token_pads_with_a_valid_id():
    ids, mask = paper_blocks(["The harbor."], tiny_tokenizer(eos=False), 20)
    assert set(ids[~mask].tolist()) == {0}


@pytest.mark.parametrize(("texts", "seq_len", "message"), [([LONG], 1, "at least 2"), ([], 8, "no paragraph")])
def test_errors(texts, seq_len, message):
    with pytest.raises(PreskipError, match=message):
        paper_blocks(texts, tiny_tokenizer(), seq_len)
