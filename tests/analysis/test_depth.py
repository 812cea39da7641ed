import pytest
import torch
from peft import get_peft_model

from preskip import PreskipConfig
from preskip.analysis.depth import depth_profile
from tiny_model import tiny_llama


def adapted(**settings):
    model = get_peft_model(tiny_llama(), PreskipConfig(init_weights="paper", **settings))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.get_base_model()


def test_profile_equals_an_independent_computation():
    model, ids = adapted(), [5, 6, 7, 8]
    rows = depth_profile(model, [ids])
    block = model.model.layers[0]
    branch = block.self_attn.preskip
    up, down, skip = (getattr(branch, part)["default"].weight for part in ("up", "down", "skip"))
    with torch.no_grad():
        x = block.input_layernorm(model.model.embed_tokens(torch.tensor([ids])))
        feature = torch.nn.functional.silu(x @ up.T) @ down.T
        enriched = x + feature
        with_skip = {}
        hook = block.self_attn.register_forward_hook(lambda m, a, o: with_skip.update(out=o[0]))
        model(input_ids=torch.tensor([ids]))
        hook.remove()
        skip_output = enriched @ skip.T
        attention = with_skip["out"] - skip_output
    assert rows[0]["layer"] == 0
    assert rows[0]["skip_norm"] == pytest.approx(skip.norm().item(), rel=1e-5)
    assert rows[0]["up_norm"] == pytest.approx(up.norm().item(), rel=1e-5)
    assert rows[0]["down_norm"] == pytest.approx(down.norm().item(), rel=1e-5)
    assert rows[0]["enrichment"] == pytest.approx((feature.norm(dim=-1) / x.norm(dim=-1)).mean().item(), rel=1e-4)
    ratio = (skip_output.norm(dim=-1) / attention.norm(dim=-1)).mean().item()
    assert rows[0]["skip_to_attention"] == pytest.approx(ratio, rel=1e-4)
    assert len(rows) == 2


def test_profile_leaves_the_model_as_it_was():
    model = adapted()
    hooks = len(model.model.layers[0].self_attn._forward_hooks)
    depth_profile(model, [[3, 4, 5]])
    assert len(model.model.layers[0].self_attn._forward_hooks) == hooks


def test_variants():
    (first, _) = depth_profile(adapted(content_skip=False), [[3, 4, 5]])
    assert first["skip_norm"] == 0.0
    assert first["skip_to_attention"] is None
    (first, _) = depth_profile(adapted(skip_rank=3), [])
    assert first["enrichment"] is None
    assert first["skip_norm"] > 0
    assert [row["layer"] for row in depth_profile(adapted(layers_to_transform=[1]), [])] == [1]
