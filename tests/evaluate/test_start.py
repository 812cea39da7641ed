"""Whether a model needs its start token: against the loss written out."""

import numpy as np
import pytest
import torch

from preskip.evaluate.start import start_gain, start_note
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


def test_only_what_matters_is_said():
    assert start_note(None) is start_note(-1.0) is start_note(0.2) is None
    assert "1.91 nats per token better behind its start token" in start_note(1.91)
