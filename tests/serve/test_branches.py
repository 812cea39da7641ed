"""What an engine does to a model's modules, done here by hand: hooks come back, what is missing is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from preskip import PreskipError
from preskip.architecture import architecture
from preskip.quantizing import Int8Linear, quantize
from preskip.serve.branches import check_hooks, put_back, with_scales
from zoo import FAMILIES

IDS = torch.arange(10, 20)[None]


def model(base_type="gemma3_text", family="gemma3", **fields):
    config = architecture(base_type).config(**FAMILIES[family].settings, **fields)
    made = architecture(base_type).model(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made


def replace_norms(model):
    """As vLLM does: a new module with the same weight in place of each norm, without the old one's hooks."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                fresh = copy.deepcopy(child)
                fresh._forward_hooks.clear()
                setattr(parent, name, fresh)


class Replicated(nn.Module):
    """Like vLLM's ReplicatedLinear: no nn.Linear."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x @ self.weight.T


@torch.no_grad()
@pytest.mark.parametrize("position", ["attention", "residual"])
def test_hooks_come_back_on_the_modules_that_are_there_now(position):
    served = model(preskip_skip_position=position)
    expected = served(IDS).last_hidden_state
    replace_norms(served)
    lost = (served(IDS).last_hidden_state - expected).abs().max().item()
    assert (lost > 1e-2) if position == "residual" else (lost == 0)
    if position == "residual":
        with pytest.raises(PreskipError, match=r"a hook of layers\.0\.self_attn\.preskip is lost"):
            check_hooks(served, served.config)
    put_back(served, served.config)
    assert torch.equal(served(IDS).last_hidden_state, expected)
    assert check_hooks(served, served.config) == 2
    put_back(served, served.config)  # again: no hook twice
    assert torch.equal(served(IDS).last_hidden_state, expected)


@torch.no_grad()
def test_layers_of_the_branch_are_made_by_the_engine_under_their_path():
    served, paths = model("llama", "llama"), []
    expected = served(IDS).last_hidden_state

    def plain(linear, path):
        paths.append(path)
        return Replicated(linear.weight)

    put_back(served, served.config, plain)
    assert paths[:3] == [f"layers.0.self_attn.preskip.{part}" for part in ("up", "down", "skip")]
    assert (served(IDS).last_hidden_state - expected).abs().max() < 1e-5


@pytest.mark.parametrize("layers", [None, [1]])
def test_a_missing_branch_is_refused(layers):
    served = model("llama", "llama", preskip_layers=layers)
    assert check_hooks(served, served.config) == len(layers or (0, 1))
    del served.layers[1].self_attn.preskip
    expected = len(layers or (0, 1))
    with pytest.raises(PreskipError, match=f"{expected - 1} of {expected} branches are in the model"):
        put_back(served, served.config)


def test_several_adapters_without_a_layer_that_tells_them_apart_are_refused():
    served = model("llama", "llama", preskip_adapters={"a": {}, "b": {}})
    with pytest.raises(PreskipError, match="holds 2 adapters, which vLLM picks by its LoRA requests: start it with"):
        put_back(served, served.config)


def test_int8_matrices_are_multiplied_by_their_scales():
    layer = Int8Linear(8, 6)
    wanted = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    layer.weight, layer.scale = quantize(wanted, torch.float32)
    name = "model.layers.0.self_attn.preskip.up"
    other = ("model.layers.0.self_attn.q_proj.scale", torch.ones(3))
    pairs = [(f"{name}.weight", layer.weight), other, (f"{name}.scale", layer.scale)]
    for given in (pairs, pairs[::-1]):
        made = dict(with_scales(given))
        assert made.keys() == {other[0], f"{name}.weight"}
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(x @ made[f"{name}.weight"].T, layer(x), atol=1e-6)
        assert (made[f"{name}.weight"] - wanted).abs().max() < 0.02
    with pytest.raises(PreskipError, match=r"preskip\.up lacks its int8 weights or their scales"):
        dict(with_scales(pairs[:1]))


def test_a_part_of_the_layers_is_counted_by_itself():
    """Pipeline parallelism: the other layers are placeholders."""
    served = model("llama", "llama")
    served.layers[0] = nn.Identity()
    assert check_hooks(served, served.config, is_whole=False) == 1
    with pytest.raises(PreskipError, match="1 of 2 branches"):
        check_hooks(served, served.config)
    served.layers[1].self_attn._forward_hooks.clear()
    with pytest.raises(PreskipError, match=r"layers\.1\.self_attn\.preskip is lost"):
        check_hooks(served, served.config, is_whole=False)
