"""int8 branches: the rounding itself, both products against float64, and a checkpoint that loads by from_pretrained."""

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import preskip
import zoo
from preskip import PreskipConfig, PreskipError, bake
from preskip.branch import FUNCTIONS
from preskip.quantizing import Int8Linear, PaddedInt8, quantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_row_is_rounded_to_its_own_grid(dtype):
    weight = torch.randn(60, 75) * torch.logspace(-4, 2, 60)[:, None]
    rounded, scale = quantize(weight, dtype)
    assert (rounded.dtype, scale.dtype) == (torch.int8, dtype)
    error = (rounded * scale.float()[:, None] - weight).abs() / scale.float()[:, None]
    assert error.max() <= 0.5 + 1e-4
    assert quantize(torch.zeros(2, 3), dtype)[0].eq(0).all()


@pytest.mark.parametrize("sides", [(60, 75), (64, 128), (192, 64)])  # torch's own kernel needs multiples of 64
@pytest.mark.parametrize("rows", [(1, 1), (3, 2), (3, 63), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_few_and_of_many_rows_are_those_of_the_rounded_matrix(rows, sides, dtype):
    shape, (inputs, outputs) = (*rows, sides[0]), sides
    layer = Int8Linear(inputs, outputs)
    layer.weight, layer.scale = quantize(torch.randn(outputs, inputs), dtype)
    x = torch.randn(shape).to(dtype)
    exact = F.linear(x.double(), layer.weight.double() * layer.scale.double()[:, None])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.inference_mode():
        products = [layer(x)] + [PaddedInt8(layer)(x)] * (dtype == torch.bfloat16)
    for found in products:
        assert (found.dtype, found.shape) == (dtype, (*rows, outputs))
        assert (found.double() - exact).abs().max() <= tolerance * exact.abs().max()
    slope = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)[0]
    wanted = (layer.weight.double() * layer.scale.double()[:, None]).sum(0).expand(shape)
    assert (slope.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_baked_and_loaded_it_computes_with_the_rounded_weights(family, dtype, tmp_path):
    model = get_peft_model(zoo.build(family, dtype=dtype), PreskipConfig(gated=True, skip_rank=4)).eval()
    zoo.randomise(model)
    bake(model, tmp_path / "out", quantize="int8")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    branches = {name: t for name, t in baked.state_dict().items() if ".preskip." in name}
    kept = torch.float32 if dtype == torch.float16 else torch.int8  # float16 branches compute in float32
    assert {t.dtype for name, t in branches.items() if name.endswith("weight")} == {kept}
    assert len(branches) == 2 * 5 * zoo.LAYERS
    with torch.no_grad():  # the adapter on weights rounded by hand
        for name, parameter in model.named_parameters():
            if ".preskip." in name:
                rounded, scale = quantize(parameter, dtype if dtype == torch.bfloat16 else torch.float32)
                parameter.copy_(rounded * scale.float()[:, None])
        wanted, found = zoo.logits(model, family), zoo.logits(baked, family)
        assert (found - wanted).abs().max() <= (1e-5 if dtype == torch.float32 else 3e-2) * wanted.abs().max()
        with preskip.optimize(baked):
            assert torch.equal(zoo.logits(baked, family), found)
    baked.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype).eval()
    assert torch.equal(zoo.logits(again, family), zoo.logits(baked, family))


@pytest.mark.parametrize("sides", [(60, 75), (64, 75), (60, 64)])
def test_sides_that_are_no_multiples_take_the_kernel_too(sides, monkeypatch):
    calls = []
    kernel = torch._weight_int8pack_mm
    monkeypatch.setattr(torch, "_weight_int8pack_mm", lambda *args: calls.append(args[1].shape) or kernel(*args))
    layer = Int8Linear(*sides)
    x = torch.ones(2, 4, sides[0], dtype=torch.bfloat16)
    with torch.inference_mode():
        product = PaddedInt8(layer)
        assert product(x).shape == (2, 4, sides[1])
        product(torch.cat([x, x]))  # 16 rows multiply faster by a converted matrix
        layer(x)
    product(x)  # has a gradient
    assert calls == [torch.Size((-(-sides[1] // 64) * 64, 64))]


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "mish"])
def test_the_inner_width_may_stay_padded_between_two_products(activation):
    up, down = Int8Linear(60, 75), Int8Linear(75, 60)
    for layer in (up, down):
        layer.weight, layer.scale = quantize(torch.randn(layer.out_features, layer.in_features), torch.bfloat16)
    x = torch.randn(2, 3, 60).bfloat16()
    with torch.inference_mode():
        inner = FUNCTIONS[activation](PaddedInt8(up, wide=True)(x))
        assert inner.shape == (2, 3, 128)
        assert torch.equal(PaddedInt8(down)(inner), PaddedInt8(down)(FUNCTIONS[activation](PaddedInt8(up)(x))))


def test_what_cannot_be_quantised_is_refused(tmp_path):
    model = get_peft_model(zoo.build("llama"), PreskipConfig())
    with pytest.raises(PreskipError, match="choose int8"):
        bake(model, tmp_path / "out", quantize="int3")
    with pytest.raises(PreskipError, match="either keep_float32 or quantize"):
        bake(model, tmp_path / "out", quantize="int8", keep_float32=True)
    assert not list(tmp_path.iterdir())
