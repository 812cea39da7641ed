"""Branches are found where they are, whatever their attention is called: what was adapted is what is measured."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

import zoo
from preskip import PreskipConfig, PreskipError, optimize
from preskip.analysis.ablation import ablate
from preskip.analysis.branches import live_branches
from preskip.analysis.depth import depth_profile
from preskip.arms import attention_layers, attention_paths
from preskip.data.blocks import Window
from tiny_explain import adapted

IDS = [np.random.default_rng(i).integers(8, zoo.VOCABULARY, 9).tolist() for i in range(3)]


def renamed() -> nn.Module:
    """A Llama whose attentions have a name that nobody knows."""
    model = zoo.build("llama")
    for block in model.model.layers:
        block.token_mixer = block.self_attn
        del block.self_attn
        block.forward = _forward.__get__(block)
    return model


def _forward(block, hidden_states, **kwargs):
    """LlamaDecoderLayer's."""
    hidden_states = hidden_states + block.token_mixer(block.input_layernorm(hidden_states), **kwargs)[0]
    return hidden_states + block.mlp(block.post_attention_layernorm(hidden_states))


def test_attentions_of_an_unknown_name_are_measured_as_those_of_a_known_one() -> None:
    rows, profiles = [], []
    for base, target in ((renamed(), r".*\.token_mixer"), (zoo.build("llama"), None)):
        model = get_peft_model(base, PreskipConfig(target_modules=target)).eval()
        zoo.randomise(model)
        assert [branch.layer for branch in live_branches(model)] == [0, 1]
        profiles.append(depth_profile(base, IDS))
        rows.append(ablate(model, [Window(ids, 1) for ids in IDS], [0, 1, 2], [20, 30, 40]))
    assert profiles[0] == profiles[1]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_every_branch_is_found_in_its_block(name: str) -> None:
    model = adapted(name)
    found = {branch.site.name: branch for branch in live_branches(model)}
    assert found.keys() == zoo.FAMILIES[name].attention_names
    for path, branch in found.items():
        assert branch.layer in zoo.FAMILIES[name].layers
        assert any(module is branch.attention for module in branch.block.modules())
        assert path.startswith(f"{branch.site.stack}.{branch.layer}.")


def test_a_vision_tower_that_was_named_is_found() -> None:
    model = get_peft_model(zoo.build("llava"), PreskipConfig(target_modules=r".*vision.*\.self_attn"))
    assert [branch.layer for branch in live_branches(model)] == [0, 1]
    assert all("vision" in branch.site.stack for branch in live_branches(model))


def test_an_optimised_model_is_measured_after_it_is_put_back() -> None:
    model, windows = adapted("llama"), [Window(ids, 1) for ids in IDS]

    def depth() -> list:
        return depth_profile(model, IDS)

    def ablation() -> list:
        return ablate(model, windows, [0, 1, 2], [20, 30, 40])

    wanted = depth(), ablation()
    with optimize(model):
        for measure in (depth, ablation):
            with pytest.raises(PreskipError, match=r"optimised.*call \.remove\(\) of what preskip\.optimize returned"):
                measure()
    assert (depth(), ablation()) == wanted


def test_an_attention_in_no_list_of_blocks_is_refused_when_it_is_named() -> None:
    model = nn.Module()
    model.config = zoo.build("llama").config
    model.self_attn = zoo.build("llama").model.layers[0].self_attn
    with pytest.raises(PreskipError, match="self_attn lies in no list of blocks"):
        get_peft_model(model, PreskipConfig(target_modules=["self_attn"]))


@torch.no_grad()
def test_layers_attention_are_those_that_have_it() -> None:
    hybrid, plain = zoo.build("lfm2"), zoo.build("llama")
    assert attention_layers(hybrid, ("attention",)) == (1,)
    assert attention_layers(plain, ("attention",)) == (0, 1)
    assert attention_layers(plain, (1,)) == (1,)
    assert attention_layers(plain, None) is None
    assert attention_paths(hybrid, attention_layers(hybrid, ("attention",))) == ["model.layers.1.self_attn"]
    with pytest.raises(PreskipError, match="to adapt only the others"):
        attention_paths(hybrid, None)
