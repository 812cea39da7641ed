"""How a model reads the blocks to train on: against the loss written out."""

import numpy as np
import pytest
import torch

from preskip.evaluate.training_text import reading_notes, special_loss, start_gain
from tiny_model import tiny_llama
from tiny_text import tiny_tokenizer


@torch.no_grad()
def test_the_gain_is_the_difference_of_two_losses():
    model, tokenizer = tiny_llama().eval(), tiny_tokenizer()
    blocks = np.random.default_rng(5).integers(8, 100, (10, 12)).astype(np.int32)

    def loss(rows):
        logits = model(rows).logits[:, -12:-1].float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, -11:].flatten())

    rows = torch.tensor(blocks[:8], dtype=torch.long)
    start = torch.full((8, 1), tokenizer.bos_token_id)
    expected = loss(rows) - loss(torch.cat((start, rows), dim=1))
    assert start_gain(model, tokenizer, blocks) == pytest.approx(expected.item(), abs=1e-3)
    assert expected.abs() > 2e-3


def test_nothing_is_known_where_the_token_is_there_or_is_none_or_the_loss_is_not_finite():
    model = tiny_llama().eval()
    blocks = np.full((2, 6), 9, dtype=np.int32)
    assert start_gain(model, tiny_tokenizer(lead=True), blocks) is None
    assert start_gain(model, tiny_tokenizer(bos=False, eos=False), blocks) is None
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    assert start_gain(model, tiny_tokenizer(), blocks) is None


@torch.no_grad()
def test_special_tokens_in_the_text_have_their_share_of_the_loss():
    """Not those that stand between documents; of one that the model never predicts it is large."""
    model, tokenizer = tiny_llama().eval(), tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>", "<c>"]})
    a, b, c = tokenizer.convert_tokens_to_ids(["<a>", "<b>", "<c>"])
    if c >= model.config.vocab_size:
        model.resize_token_embeddings(c + 1)
    blocks = np.random.default_rng(5).integers(8, 90, (10, 12)).astype(np.int32)
    blocks[:, 4], blocks[0, 6], blocks[:, 8] = a, b, tokenizer.eos_token_id
    blocks[9] = c  # not read
    rows = torch.tensor(blocks[:8], dtype=torch.long)
    losses = torch.nn.functional.cross_entropy(model(rows).logits[:, :-1].mT, rows[:, 1:], reduction="none")
    shares = {"<a>": losses[:, 3].sum() / losses.sum(), "<b>": losses[0, 5] / losses.sum()}
    found = special_loss(model, tokenizer, blocks)
    assert list(found) == ["<a>", "<b>"]
    assert found == {token: pytest.approx(share.item(), abs=6e-4) for token, share in shares.items()}
    model.lm_head.weight.fill_(torch.nan)
    assert special_loss(model, tokenizer, blocks) is None


def test_only_what_matters_is_said():
    for facts in ({}, {"start_gain": None, "special_loss": None}, {"start_gain": -1.0, "special_loss": {}}):
        assert reading_notes(facts) == []
    assert reading_notes({"start_gain": 0.2, "special_loss": {"<unk>": 0.04}}) == []
    [note] = reading_notes({"start_gain": 1.91})
    assert "1.91 nats per token better behind its start token" in note
    [note] = reading_notes({"start_gain": 0.0, "special_loss": {"<unk>": 0.24, "<mask>": 0.01}})
    assert "25% of the untouched model's loss on the training blocks is at <unk>, <mask>" in note
