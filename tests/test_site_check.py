"""Attention modules of types without a test: what the method cannot use is refused, whatever it is called."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

import zoo
from preskip import PreskipConfig, PreskipError
from preskip.attach import find_sites
from preskip.site_check import TESTED, check_role

TINY = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
VISION = {key: value for key, value in TINY.items() if key != "vocab_size"} | {"image_size": 16, "patch_size": 8}
WHISPER = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
    "max_source_positions": 10, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
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


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("Albert", {**TINY, "embedding_size": 16}, "holds a residual, a norm"),
        ("MPNet", TINY, "holds a residual, a norm"),
        ("SqueezeBert", {**TINY, "embedding_size": 32}, r"its output is dict, its input \(1, 32, 4\)"),
        (
            "Funnel",
            {"vocab_size": 64, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [1, 1]},
            "given the hidden states once more, as its argument 2",
        ),
    ],
)
def test_what_the_method_cannot_use_is_refused_with_its_reason(name: str, settings: dict, reason: str) -> None:
    model = build(name, **settings)
    keys, hooks = list(model.state_dict()), [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(PreskipError, match=reason):
        get_peft_model(model, PreskipConfig())
    assert list(model.state_dict()) == keys
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Electra", {**TINY, "embedding_size": 16}),
        ("DebertaV2", TINY),
        ("DistilBert", {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
        ("Granite", {**TINY, "num_key_value_heads": 2}),
        ("Mpt", {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}),
        ("Dinov2", VISION),
        ("CLIPVision", VISION),
        ("SiglipVision", VISION),
        ("Whisper", WHISPER),
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


def test_linear_attention_is_not_taken_for_attention() -> None:
    model = build(
        "MiniMax",
        **TINY,
        num_key_value_heads=2,
        num_local_experts=2,
        layer_types=["linear_attention", "full_attention"],
    )
    found = find_sites(model)
    assert [site.name for site in found.attentions] == ["layers.1.self_attn"]
    assert found.blocks_without == ("layers.0",)
    with pytest.raises(PreskipError, match=r"layers_to_transform=\[1\]"):
        get_peft_model(model, PreskipConfig())
    adapted = get_peft_model(model, PreskipConfig(layers_to_transform=[1]))
    assert sum(".preskip.skip." in key for key in adapted.state_dict()) == 1
