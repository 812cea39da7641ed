"""Where a model has self-attention: which modules are found, chosen and refused; the width that they read."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import zoo
from preskip import PreskipError
from preskip.sites import coverage, find_sites, input_width, text_decoder


@pytest.mark.parametrize("name", ["llava", "gemma3_vision"])
def test_of_a_vision_language_model_only_the_text_decoder_is_taken(name: str) -> None:
    model = zoo.build(name)
    decoder = text_decoder(model)
    assert decoder is model.model.language_model
    towers = [key for key, _ in model.named_modules() if key.endswith("self_attn") and "vision" in key]
    assert len(towers) == 2
    assert not {site.name for site in find_sites(model).attentions} & set(towers)


SMALL = {"num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("model", "config", "settings", "text"),
    [
        ("GitForCausalLM", "GitConfig", {"vision_config": {"num_hidden_layers": 4}}, "git.encoder.layer"),
        ("IdeficsForVisionText2Text", "IdeficsConfig", {"vision_config": SMALL}, "model.layers"),
        (
            "Phi4MultimodalForCausalLM",
            "Phi4MultimodalConfig",
            {"vision_config": SMALL, "audio_config": {"num_blocks": 2}},
            "model.layers",
        ),
    ],
)
def test_towers_of_models_that_name_no_text_decoder_are_left_alone(
    model: str, config: str, settings: dict, text: str
) -> None:
    with torch.device("meta"):
        whole = getattr(transformers, model)(getattr(transformers, config)(**SMALL, **settings))
    assert {site.stack for site in find_sites(whole).attentions} == {text}
    assert len(find_sites(whole).attentions) == 2


def test_of_an_encoder_decoder_that_sees_both_texts_are_taken() -> None:
    config = transformers.T5Gemma2Config()
    config.encoder.text_config.num_hidden_layers = config.encoder.vision_config.num_hidden_layers = 2
    config.decoder.num_hidden_layers = 2
    with torch.device("meta"):
        model = transformers.T5Gemma2ForConditionalGeneration(config)
    stacks = {site.stack for site in find_sites(model).attentions}
    assert stacks == {"model.encoder.text_model.layers", "model.decoder.layers"}


def test_an_encoder_decoder_is_taken_whole() -> None:
    model = zoo.build("bart")
    assert text_decoder(model) is model


class Block(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.ModuleDict({"q_proj": nn.Linear(8, 8)}))


class Stack(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(name) for name in names)


def test_blocks_without_attention_are_listed() -> None:
    sites = find_sites(Stack("self_attn", "mamba", "attn", "mixer"))
    assert [(site.name, site.target, site.layer) for site in sites.attentions] == [
        ("layers.0.self_attn", "self_attn", 0),
        ("layers.2.attn", "attn", 2),
    ]
    assert sites.blocks_without == ("layers.1", "layers.3")
    assert sites.layers == [0, 2]


def test_an_unknown_model_is_refused_with_what_was_found() -> None:
    with pytest.raises(PreskipError) as caught:
        find_sites(Stack("token_mixer", "token_mixer"))
    message = str(caught.value)
    assert message.startswith("no self-attention found in Stack (looked for self_attn, self_attention, attention, attn")
    assert "found layers: token_mixer" in message
    assert "target_modules" in message
    with pytest.raises(PreskipError, match="no self-attention found in Linear"):
        find_sites(nn.Linear(2, 2))


def test_coverage_names_what_is_missing_and_what_is_too_much() -> None:
    sites = find_sites(Stack("self_attn", "self_attn", "self_attn"))
    names = [site.name for site in sites.attentions]
    assert coverage(names, sites, [0, 1, 2]) == ""
    assert coverage(names[:1], sites, [0]) == ""
    assert coverage(names[:2], sites, [0, 1, 2]) == "1 of 3 attentions get no branch (layers.2.self_attn)"
    extra = coverage([*names, "tower.layers.0.self_attn"], sites, [0, 1, 2])
    assert extra == "matched outside the chosen layers or twice in one (tower.layers.0.self_attn)"


def test_the_width_comes_from_the_input_projection() -> None:
    for name in zoo.FAMILIES:
        model = zoo.build(name)
        for site in find_sites(model).attentions:
            attention = model.get_submodule(site.name)
            try:
                assert input_width(attention) == zoo.WIDTH, name
            except PreskipError:
                assert input_width(attention, 32) == zoo.WIDTH, name
    unknown = nn.ModuleDict({"mystery": nn.Linear(8, 8)})
    assert input_width(unknown, 8) == 8
    with pytest.raises(PreskipError, match="input width of ModuleDict is unknown"):
        input_width(unknown)
