"""Whole models written out by hand, with the branch in its place: plain matrix products on a state dict.

The names follow the method: x̂ `xn`, x̃ `xt`. Shapes: B batch, T tokens, d width, H heads, h head width.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import gelu, layer_norm, silu

State = dict[str, torch.Tensor]
Branch = dict[str, torch.Tensor]


def enriched(xn: torch.Tensor, branch: Branch) -> torch.Tensor:
    """x̃ = x̂ + W_down · SiLU(W_up · x̂)."""
    return xn + silu(xn @ branch["up"].T) @ branch["down"].T


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def norm(x: torch.Tensor, state: State, name: str, eps: float = 1e-5) -> torch.Tensor:
    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def linear(x: torch.Tensor, state: State, name: str) -> torch.Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def rotate(x: torch.Tensor, width: int) -> torch.Tensor:
    """RoPE with base 10000 on the first `width` features of each head, [B, H, T, h]."""
    angle = torch.outer(torch.arange(x.shape[2]), 10000.0 ** (-torch.arange(0, width, 2) / width))
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def heads(x: torch.Tensor, number: int) -> torch.Tensor:
    return x.unflatten(-1, (number, -1)).transpose(1, 2)


def attention(q, k, v, *, causal=True, scale=None, window=None, softcap=None) -> torch.Tensor:
    """Softmax attention, [B, H, T, h] → [B, T, H·h]; k and v are repeated to the heads of q."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if causal:
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])[None, :]
        allowed = (distance >= 0) & (distance < (window or 10**9))
        scores = scores.masked_fill(~allowed, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def llama(ids: torch.Tensor, s: State, branches: list[Branch]) -> torch.Tensor:
    x = s["model.embed_tokens.weight"][ids]
    for i, b in enumerate(branches):
        p = f"model.layers.{i}"
        xt = enriched(rms_norm(x, s[f"{p}.input_layernorm.weight"]), b)
        q, k, v = (heads(linear(xt, s, f"{p}.self_attn.{n}_proj"), h) for n, h in (("q", 4), ("k", 2), ("v", 2)))
        out = linear(attention(rotate(q, 8), rotate(k, 8), v), s, f"{p}.self_attn.o_proj")
        x = x + out + xt @ b["skip"].T  # before the MLP reads it
        y = rms_norm(x, s[f"{p}.post_attention_layernorm.weight"])
        gate, up = linear(y, s, f"{p}.mlp.gate_proj"), linear(y, s, f"{p}.mlp.up_proj")
        x = x + linear(silu(gate) * up, s, f"{p}.mlp.down_proj")
    return rms_norm(x, s["model.norm.weight"]) @ s["lm_head.weight"].T


def gpt_neox(ids: torch.Tensor, s: State, branches: list[Branch], parallel: bool) -> torch.Tensor:
    x = s["gpt_neox.embed_in.weight"][ids]
    for i, b in enumerate(branches):
        p = f"gpt_neox.layers.{i}"
        xt = enriched(norm(x, s, f"{p}.input_layernorm"), b)
        # Fused and interleaved: head by head q, k, v.
        q, k, v = heads(linear(xt, s, f"{p}.attention.query_key_value"), 4).chunk(3, -1)
        out = linear(attention(rotate(q, 2), rotate(k, 2), v), s, f"{p}.attention.dense")
        after = x + out + xt @ b["skip"].T
        # The parallel MLP reads x, never x̃ nor the skip.
        y = norm(x if parallel else after, s, f"{p}.post_attention_layernorm")
        x = after + linear(gelu(linear(y, s, f"{p}.mlp.dense_h_to_4h")), s, f"{p}.mlp.dense_4h_to_h")
    return norm(x, s, "gpt_neox.final_layer_norm") @ s["lm_head.weight"].T


def gpt2(ids: torch.Tensor, s: State, branches: list[Branch]) -> torch.Tensor:
    def conv1d(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ s[f"{name}.weight"] + s[f"{name}.bias"]

    x = s["transformer.wte.weight"][ids] + s["transformer.wpe.weight"][: ids.shape[1]]
    for i, b in enumerate(branches):
        p = f"transformer.h.{i}"
        xt = enriched(norm(x, s, f"{p}.ln_1"), b)
        q, k, v = (heads(t, 4) for t in conv1d(xt, f"{p}.attn.c_attn").chunk(3, -1))
        x = x + conv1d(attention(q, k, v), f"{p}.attn.c_proj") + xt @ b["skip"].T
        inner = gelu(conv1d(norm(x, s, f"{p}.ln_2"), f"{p}.mlp.c_fc"), approximate="tanh")
        x = x + conv1d(inner, f"{p}.mlp.c_proj")
    return norm(x, s, "transformer.ln_f") @ s["transformer.wte.weight"].T


def bert(ids: torch.Tensor, s: State, branches: list[Branch]) -> torch.Tensor:
    e = "bert.embeddings"
    x = s[f"{e}.word_embeddings.weight"][ids] + s[f"{e}.token_type_embeddings.weight"][0]
    x = norm(x + s[f"{e}.position_embeddings.weight"][: ids.shape[1]], s, f"{e}.LayerNorm", 1e-12)
    for i, b in enumerate(branches):
        p = f"bert.encoder.layer.{i}"
        xt = enriched(x, b)  # normed behind the previous block
        q, k, v = (heads(linear(xt, s, f"{p}.attention.self.{n}"), 4) for n in ("query", "key", "value"))
        out = linear(attention(q, k, v, causal=False), s, f"{p}.attention.output.dense")
        # The residual sum takes x̂, not x̃.
        x = norm(x + out + xt @ b["skip"].T, s, f"{p}.attention.output.LayerNorm", 1e-12)
        inner = linear(gelu(linear(x, s, f"{p}.intermediate.dense")), s, f"{p}.output.dense")
        x = norm(x + inner, s, f"{p}.output.LayerNorm", 1e-12)
    t = "cls.predictions.transform"
    x = norm(gelu(linear(x, s, f"{t}.dense")), s, f"{t}.LayerNorm", 1e-12)
    return x @ s["bert.embeddings.word_embeddings.weight"].T + s["cls.predictions.bias"]


def gemma2(ids: torch.Tensor, s: State, branches: list[Branch], skip_position: str) -> torch.Tensor:
    def unit_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, 1 + s[f"{name}.weight"])

    x = s["model.embed_tokens.weight"][ids] * math.sqrt(32)
    for i, b in enumerate(branches):
        p = f"model.layers.{i}"
        xt = enriched(unit_norm(x, f"{p}.input_layernorm"), b)
        q, k, v = (heads(linear(xt, s, f"{p}.self_attn.{n}_proj"), h) for n, h in (("q", 4), ("k", 2), ("v", 2)))
        window = 8 if i % 2 == 0 else None
        mixed = attention(rotate(q, 16), rotate(k, 16), v, scale=256**-0.5, window=window, softcap=50.0)
        out, skip = linear(mixed, s, f"{p}.self_attn.o_proj"), xt @ b["skip"].T
        if skip_position == "attention":
            x = x + unit_norm(out + skip, f"{p}.post_attention_layernorm")
        else:
            x = x + unit_norm(out, f"{p}.post_attention_layernorm") + skip
        y = unit_norm(x, f"{p}.pre_feedforward_layernorm")
        gate, up = linear(y, s, f"{p}.mlp.gate_proj"), linear(y, s, f"{p}.mlp.up_proj")
        inner = linear(gelu(gate, approximate="tanh") * up, s, f"{p}.mlp.down_proj")
        x = x + unit_norm(inner, f"{p}.post_feedforward_layernorm")
    logits = unit_norm(x, "model.norm") @ s["model.embed_tokens.weight"].T
    return torch.tanh(logits / 30.0) * 30.0
