"""oneDNN's linear layers against the written-out product, and what is left to torch."""

import pytest
import torch
from torch.nn.functional import linear

from preskip.data.blocks import Window
from preskip.evaluate import kernels
from preskip.evaluate.likelihood import score_sequences
from tiny_model import tiny_llama

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.mark.parametrize("shape", [(63, 60), (3, 7, 60), (1, 1, 60)])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_linear_layers_are_the_product(shape, bias):
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(shape, generator=generator), torch.randn(33, 60, generator=generator)
    offset = torch.randn(33, generator=generator) if bias else None
    expected = inputs.double() @ weight.double().T + (offset.double() if bias else 0)
    with kernels.OneDnnLinear():
        for given in (inputs, inputs.transpose(0, -2).contiguous().transpose(0, -2)):
            torch.testing.assert_close(linear(given, weight, offset).double(), expected, rtol=1e-5, atol=1e-5)
        assert linear(inputs[:0], weight, offset).shape == (0, *shape[1:-1], 33)
        half = linear(inputs.bfloat16(), weight.bfloat16())
    assert torch.equal(half, linear(inputs.bfloat16(), weight.bfloat16()))


def test_autocast_is_left_as_it_is():
    inputs, weight = torch.randn(70, 64), torch.randn(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = linear(inputs, weight)
        with kernels.OneDnnLinear():
            found = linear(inputs, weight)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_scores_are_the_same_with_either(monkeypatch):
    model = tiny_llama()
    windows = [Window([*range(5, 25), *range(30 + start, 40 + start)], 20) for start in range(0, 60, 10)]
    scores = []
    for narrow in (False, True):
        monkeypatch.setattr(kernels, "_narrow_products", lambda narrow=narrow: narrow)
        scores.append(score_sequences(model, windows))
    for mine, other in zip(*scores, strict=True):
        assert mine.nll == pytest.approx(other.nll, rel=1e-6)
        assert mine.greedy == other.greedy
