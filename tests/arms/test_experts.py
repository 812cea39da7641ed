"""Experts that are stacked in one tensor: their share of the weights, and the note that LoRA does not reach them."""

import pytest

from preskip.arms import ARMS, attention_paths
from preskip.arms.budget import linear_shapes
from preskip.arms.experts import experts_note, stacked_share
from zoo import build


def test_the_share_is_that_of_the_experts_which_lora_leaves_out():
    model = build("mixtral")
    named = {name: weight.numel() for name, weight in model.named_parameters()}
    experts = {name: size for name, size in named.items() if ".experts." in name}
    assert len(experts) == 2 * model.config.num_hidden_layers
    share = stacked_share(model, model.config)
    assert share == pytest.approx(sum(experts.values()) / sum(named.values()))
    assert share > 0.2
    assert not [name for name in linear_shapes(model, attention_paths(model), "all") if ".experts" in name]


def test_a_dense_model_has_none():
    model = build("llama")
    assert stacked_share(model, model.config) == 0.0


def test_only_arms_that_are_said_to_be_everywhere_are_named():
    said = [name for name, arm in ARMS.items() if "linear layers" in arm.description]
    assert f"layer: {', '.join(said)} sit on" in experts_note(0.6, list(ARMS))
    assert experts_note(0.0, ["lora"]) is None
    assert experts_note(0.6, ["none", "preskip", "lora-attention"]) is None
    assert experts_note(0.634, ["none", "lora", "preskip", "hira"]) == (
        "63% of the model's weights are experts stacked in one tensor, where PEFT's arms find no linear layer: lora, "
        "hira sit on what else is linear"
    )
    assert experts_note(0.5, ["lora-mlp"]).endswith("lora-mlp sits on what else is linear")
