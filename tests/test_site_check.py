"""Attention modules of types without a test: what the method cannot use is refused, whatever it is called."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

import zoo
from preskip import PreskipConfig, PreskipError
from preskip.site_check import TESTED, check_role
from preskip.sites import find_sites

TINY = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
VISION = {key: value for key, value in TINY.items() if key != "vocab_size"} | {"image_size": 16, "patch_size": 8}
T5 = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def build(name: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}Model")(config).eval()


def sites(model: nn.Module) -> list[str]:
    return [site.name for site in find_sites(model).attentions]


def test_the_tested_classes_are_those_of_the_families() -> None:
    found = set()
    for name, family in zoo.FAMILIES.items():
        model = zoo.build(name)
        found |= {type(model.get_submodule(path)).__name__ for path in family.attention_names}
    assert found == TESTED


def test_no_tested_family_would_be_refused(monkeypatch) -> None:
    monkeypatch.setattr("preskip.site_check.TESTED", set())
    for name in zoo.FAMILIES.keys() - {"bloom"}:  # whose attention adds the residual: its sum is tested with it
        family = zoo.FAMILIES[name]
        check_role(zoo.build(name), sorted(family.attention_names))


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_what_the_method_cannot_use_is_refused_with_its_reason(name: str) -> None:
    model = zoo.build_refused(name)
    keys, hooks = list(model.state_dict()), [len(m._forward_hooks) for m in model.modules()]
    for layers in (None, "attention"):
        with pytest.raises(PreskipError, match=re.escape(zoo.REFUSED[name].why)) as caught:
            get_peft_model(model, PreskipConfig(layers_to_transform=layers))
        assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == keys
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("bart", r".*encoder_attn"),
        ("t5", r".*EncDecAttention"),
        ("whisper", r".*decoder.*_attn"),
    ],
)
def test_cross_attention_is_refused_before_anything_runs(name: str, target: str) -> None:
    with pytest.raises(PreskipError, match="it runs as cross-attention"):
        get_peft_model(zoo.build(name), PreskipConfig(target_modules=target))


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("IBert", TINY, "its output is tuple, its input"),
        ("Luke", {**TINY, "entity_vocab_size": 8, "entity_emb_size": 32}, "it reads entity_hidden_states, too"),
    ],
)
def test_attention_of_more_than_one_tensor_is_refused(name: str, settings: dict, why: str) -> None:
    with pytest.raises(PreskipError, match=why):
        get_peft_model(build(name, **settings), PreskipConfig())


class Bare(nn.Module):
    """A model of one block whose attention reads a second tensor, made of the tokens (and of nothing else)."""

    main_input_name = "input_ids"

    def __init__(self, second) -> None:
        super().__init__()
        self.config = transformers.LlamaConfig(**TINY)
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList([nn.Module()])
        self.layers[0].self_attn = TwoReader()
        self.second = second

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return self.layers[0].self_attn(x, self.second(x))


class TwoReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden_states, memory):
        scores = self.q_proj(hidden_states) @ self.k_proj(memory).transpose(1, 2)
        return self.q_proj(scores.softmax(-1) @ hidden_states)


def test_a_second_argument_made_of_the_tokens_is_refused_and_one_that_is_not_is_none_of_its_business() -> None:
    with pytest.raises(PreskipError, match="its argument 2 depends on the tokens, too"):
        check_role(Bare(lambda x: 2 * x), ["layers.0.self_attn"])
    with pytest.raises(PreskipError, match="given the hidden states once more, as its argument 2"):
        check_role(Bare(lambda x: x.clone()), ["layers.0.self_attn"])
    check_role(Bare(torch.zeros_like), ["layers.0.self_attn"])


def test_one_class_of_attention_is_checked_in_every_class_of_block() -> None:
    class Twice(Bare):
        """Its second block calls the attention that the first one gives the tokens alone in another way."""

        def forward(self, input_ids):
            x = self.embed(input_ids)
            x = self.layers[0].self_attn(x, torch.zeros_like(x))
            return self.layers[1].self_attn(x, 2 * x)

    model = Twice(None)
    model.layers.append(nn.Sequential())
    model.layers[1].self_attn = TwoReader()
    check_role(model, ["layers.0.self_attn"])
    with pytest.raises(PreskipError, match=r"layers\.1\.self_attn .*its argument 2 depends on the tokens, too"):
        check_role(model, ["layers.0.self_attn", "layers.1.self_attn"])


def test_a_class_of_a_tested_name_from_elsewhere_is_checked() -> None:
    model = Bare(lambda x: 2 * x)
    model.layers[0].self_attn.__class__ = type("LlamaAttention", (TwoReader,), {})
    with pytest.raises(PreskipError, match=r"LlamaAttention at .* depends on the tokens"):
        check_role(model, ["layers.0.self_attn"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DistilBert", {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
        ("Granite", {**TINY, "num_key_value_heads": 2}),
        ("Mpt", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}),
        ("Dinov2", VISION),
        ("Siglip2Vision", {**VISION, "num_patches": 4}),
        ("LongT5", {**T5, "encoder_attention_type": "transient-global"}),
        ("SwitchTransformers", {**T5, "num_experts": 2}),
    ],
)
def test_others_get_a_branch_that_changes_nothing_at_first_and_something_later(name: str, settings: dict) -> None:
    from preskip.site_check import small_input

    model = build(name, **settings)
    run = lambda: model(**small_input(model))[0].detach()  # noqa: E731
    with torch.no_grad():
        before = run()
        adapted = get_peft_model(model, PreskipConfig(target_modules=sites(model)))
        assert torch.equal(run(), before)
        zoo.randomise(adapted)
        assert not torch.equal(run(), before)


def test_a_model_that_cannot_be_run_is_refused() -> None:
    with torch.device("meta"):
        model = transformers.GraniteModel(transformers.GraniteConfig(**TINY, num_key_value_heads=2))
    with pytest.raises(PreskipError, match="on the meta device"):
        check_role(model, sites(model))


def test_a_block_sparse_big_bird_is_refused_before_it_makes_itself_another_model() -> None:
    settings = {**TINY, "max_position_embeddings": 64, "block_size": 2, "num_random_blocks": 1, "sep_token_id": 2}
    model = build("BigBird", **settings, attention_type="block_sparse")
    with pytest.raises(PreskipError, match='load the model with attention_type="original_full"'):
        get_peft_model(model, PreskipConfig())
    assert model.attention_type == "block_sparse"
    check_role(build("BigBird", **settings, attention_type="original_full"), ["encoder.layer.0.attention.self"])


def test_a_model_that_reads_something_else_is_refused() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = nn.MultiheadAttention(8, 2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Own()])

    with pytest.raises(PreskipError, match=r"MultiheadAttention at layers\.0\.self_attn has no test here"):
        check_role(Model(), ["layers.0.self_attn"])


def test_training_mode_is_put_back_module_by_module() -> None:
    model = build("Granite", **TINY, num_key_value_heads=2).train()
    model.layers[0].eval()
    before = [module.training for module in model.modules()]
    check_role(model, sites(model))
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("name", [name for name, family in zoo.FAMILIES.items() if family.chosen])
def test_of_a_hybrid_the_attention_layers_are_found_and_the_others_named(name: str) -> None:
    family, model = zoo.FAMILIES[name], zoo.build(name)
    found = find_sites(model)
    assert {site.name for site in found.attentions} == family.attention_names
    count = len(model.model.layers)
    assert found.blocks_without == tuple(f"model.layers.{i}" for i in range(count) if i not in family.layers)
    advice = rf"{found.blocks_without[0]}.*layers_to_transform={list(family.layers)}".replace("[", r"\[")
    with pytest.raises(PreskipError, match=advice):
        get_peft_model(model, PreskipConfig())
    adapted = get_peft_model(model, PreskipConfig(layers_to_transform="attention"))
    assert adapted.peft_config["default"].layers_to_transform == list(family.layers)
    assert sum(".preskip.skip." in key for key in adapted.state_dict()) == len(family.layers)


def test_another_word_for_layers_is_refused() -> None:
    with pytest.raises(
        PreskipError, match="layers_to_transform='mamba' is not possible: give layer indices or 'attention'"
    ):
        get_peft_model(zoo.build("jamba"), PreskipConfig(layers_to_transform="mamba"))
