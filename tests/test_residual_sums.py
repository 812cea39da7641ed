"""Where the skip joins in blocks of other shapes: each block's sum written out, with the base's own attention and MLP.

x is the block's input, x̂ what its attention reads, x̃ what it reads with the branch; `joined(x̂)` is the method's
Attention(x̃) + W_skip x̃. A factor or a norm of the block between attention and its sum takes in the skip, too.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.functional import gelu

import zoo
from equations import enriched
from preskip import PreskipConfig
from preskip.adapter import PreskipLayer
from preskip.sites import AttentionSite, find_sites

Joined = Callable[[torch.Tensor], torch.Tensor]


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def pre_norm(norm: str, mlp_norm: str, mlp: str) -> Callable[..., torch.Tensor]:
    """x + joined(norm x), then x + MLP(norm x)."""

    def block(b: Any, x: torch.Tensor, joined: Joined, given: dict[str, Any]) -> torch.Tensor:
        x = x + joined(b.get_submodule(norm)(x))
        return x + first(b.get_submodule(mlp)(b.get_submodule(mlp_norm)(x)))

    return block


def t5(b: Any, x: torch.Tensor, joined: Joined, given: dict[str, Any]) -> torch.Tensor:
    x = x + joined(b.layer[0].layer_norm(x))
    if len(b.layer) == 3:
        x = x + given["cross"]
    inner, norm = b.layer[-1].DenseReluDense, b.layer[-1].layer_norm
    y = norm(x)
    if hasattr(inner, "wi_0"):
        return x + inner.wo(gelu(inner.wi_0(y), approximate="tanh") * inner.wi_1(y))
    return x + inner.wo(torch.relu(inner.wi(y)))


def whisper(b: Any, x: torch.Tensor, joined: Joined, given: dict[str, Any]) -> torch.Tensor:
    x = x + joined(b.self_attn_layer_norm(x))
    if hasattr(b, "encoder_attn"):
        x = x + given["cross"]
    return x + b.fc2(gelu(b.fc1(b.final_layer_norm(x))))


def bert(b: Any, x: torch.Tensor, joined: Joined, given: dict[str, Any]) -> torch.Tensor:
    x = b.attention.output.LayerNorm(x + joined(x))
    return b.output.LayerNorm(x + b.output.dense(gelu(b.intermediate.dense(x))))


def granite4(b: Any, x: torch.Tensor, joined: Joined, given: dict[str, Any]) -> torch.Tensor:
    x = x + 0.5 * joined(b.input_layernorm(x))
    y = b.post_attention_layernorm(x)
    return x + 0.5 * (first(b.block_sparse_moe(y)) + b.shared_mlp(y))


def falcon_h1(b: Any, x: torch.Tensor, joined: Joined, given: dict[str, Any]) -> torch.Tensor:
    y = b.input_layernorm(x)
    x = x + 0.9 * b.mamba(hidden_states=y) + 0.7 * joined(0.5 * y)
    return x + b.feed_forward(b.pre_ff_layernorm(x))


def nemotron_h(b: Any, x: torch.Tensor, joined: Joined, given: dict[str, Any]) -> torch.Tensor:
    return x + joined(b.norm(x))


def minimax(b: Any, x: torch.Tensor, joined: Joined, given: dict[str, Any]) -> torch.Tensor:
    xn = b.input_layernorm(x)
    y = b.post_attention_layernorm(1.5 * xn + joined(xn))
    return y + first(b.mlp(y))


def gemma4(b: Any, x: torch.Tensor, joined: Joined, given: dict[str, Any]) -> torch.Tensor:
    x = x + b.post_attention_layernorm(joined(b.input_layernorm(x)))
    x = x + b.post_feedforward_layernorm(b.mlp(b.pre_feedforward_layernorm(x)))
    gate = gelu(b.per_layer_input_gate(x), approximate="tanh")
    x = x + b.post_per_layer_input_norm(b.per_layer_projection(gate * given["per_layer_input"]))
    return x * b.layer_scalar


def gemma3n(b: Any, x: torch.Tensor, joined: Joined, given: dict[str, Any]) -> torch.Tensor:
    predicted = b.altup.predict(x)
    active = predicted[0]
    xn = b.input_layernorm(active)
    y = (active + b.post_attention_layernorm(joined(xn)) + b.laurel(xn)) / math.sqrt(2)
    y = y + b.post_feedforward_layernorm(b.mlp(b.pre_feedforward_layernorm(y)))
    corrected = b.altup.correct(predicted, y)
    gate = gelu(b.per_layer_input_gate(b.altup.scale_corrected_output(corrected[0].clone())), approximate="tanh")
    corrected[1:] += b.post_per_layer_input_norm(b.per_layer_projection(gate * given["per_layer_input"]))
    return corrected


LLAMA = pre_norm("input_layernorm", "post_attention_layernorm", "mlp")
CLIP = pre_norm("layer_norm1", "layer_norm2", "mlp")
SUMS = {
    "t5": t5, "t5_gated": t5, "umt5": t5, "whisper": whisper, "electra": bert, "deberta": bert, "clip_text": CLIP,
    "clip_vision": CLIP, "siglip_text": CLIP, "siglip_vision": CLIP, "clip": CLIP, "siglip": CLIP, "gemma3n": gemma3n,
    "gemma4": gemma4, "qwen3_next": LLAMA, "lfm2": pre_norm("operator_norm", "ffn_norm", "feed_forward"),
    "granite4": granite4, "falcon_h1": falcon_h1,
    "jamba": pre_norm("input_layernorm", "pre_ff_layernorm", "feed_forward"),
    "nemotron_h": nemotron_h, "recurrent_gemma": pre_norm("temporal_pre_norm", "channel_pre_norm", "mlp_block"),
    "minimax": minimax, "llama": LLAMA, "bert": bert,
}  # fmt: skip
CROSS = ("layer.1.EncDecAttention", "encoder_attn")


def seen_in(model: nn.Module, site: AttentionSite, name: str) -> dict[str, Any]:
    """The arguments and output of one block, its attention and its cross-attention, in a pass of the adapted model."""
    seen: dict[str, Any] = {}

    def note(key: str, module: nn.Module) -> None:
        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            seen[key] = {**bound, **bound.pop("kwargs", {})}, first(output)

        module.register_forward_hook(keep, with_kwargs=True)

    block = model.get_submodule(f"{site.stack}.{site.layer}")
    note("block", block)
    note("attention", model.get_submodule(site.name))
    for path, module in block.named_modules():
        if path in CROSS:
            note("cross", module)
    model(**zoo.inputs(name), **({"use_cache": False} if zoo.FAMILIES[name].causal else {}))
    return seen


def joined_by(untouched: nn.Module, site: AttentionSite, dense: str | None, weights: Any, given: Any) -> Joined:
    """x̂ → Attention(x̃) + W_skip x̃, with the attention of the untouched model."""
    attention = untouched.get_submodule(site.name)

    def joined(xn: torch.Tensor) -> torch.Tensor:
        xt = enriched(xn, weights)
        output = first(attention(**{**given, "hidden_states": xt}))
        if dense is not None:
            output = untouched.get_submodule(dense.format(site.layer))(output)
        return output + xt @ weights["skip"].T

    return joined


@pytest.mark.parametrize("name", SUMS)
@torch.no_grad()
def test_the_sum_of_each_block_written_out(name: str) -> None:
    family, model, untouched = zoo.FAMILIES[name], zoo.build(name), zoo.build(name)
    get_peft_model(model, PreskipConfig(layers_to_transform=family.chosen)).eval()
    zoo.randomise(model)
    sites = find_sites(untouched).attentions
    assert len(sites) == len(family.attention_names)
    for site in sites:
        layer = model.get_submodule(f"{site.name}.preskip")
        assert isinstance(layer, PreskipLayer)
        weights = {part: linear.weight for part, linear in layer.linears("default").items()}
        seen = seen_in(model, site, name)
        given, output = seen["block"]
        if "cross" in seen:
            given["cross"] = seen["cross"][1]
        joined = joined_by(untouched, site, family.dense, weights, seen["attention"][0])
        block = untouched.get_submodule(f"{site.stack}.{site.layer}")
        x = given["activations" if "activations" in given else "hidden_states"]
        assert zoo.difference(SUMS[name](block, x, joined, given), output) <= 1e-5
