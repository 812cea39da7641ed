"""What a model costs: the weights it looks up, and the FLOPs of a token forward and in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from preskip.arms.experts import experts_of

# Forward and backward: a matrix product has two more of its size in the backward pass.
TRAINING_FACTOR = 3


def embedding_parameters(model: nn.Module) -> int:
    """Weights that are only looked up: of token and position embeddings. An output head tied to one counts here."""
    weights = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(weights.values())


def looked_up(model: nn.Module) -> set[int]:
    """The `id` of every weight of an embedding; that of a tied output head is among them."""
    return {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}


def forward_flops_per_token(model: nn.Module, seq_len: int) -> int:
    """FLOPs of one token in a forward pass over sequences of `seq_len`, 2 per multiply-add.

    Counted are the matrix products: every matrix of a linear layer once, the output head also where it is tied, of a
    mixture of experts those that a token visits, and attention's two products, 4 · seq_len · width per layer, as if no
    entry were masked (the usual convention: a causal kernel may skip half). Norms, activations and the softmax are not.

    Args:
        model: a causal language model of transformers; it may be on the meta device.
        seq_len: tokens per sequence.
    """
    config: Any = model.config
    config = config.get_text_config()
    body, head = matrix_weights(model)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    return 2 * (body + head) + 4 * seq_len * layers * heads * head_width(config)


def matrix_weights(model: nn.Module) -> tuple[int, int]:
    """Weights that one token is multiplied by: those before the output head, and the head's, also where it is tied."""
    config: Any = model.config
    config = config.get_text_config()
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    apart = looked_up(model) | {id(head.weight)}
    body = sum(active_weights(p, config) for p in model.parameters() if p.ndim >= 2 and id(p) not in apart)
    return body + sum(b.numel() for b in model.buffers() if b.dtype == torch.int8 and b.ndim == 2), head.weight.numel()


def head_width(config: Any) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_width(config: Any) -> int:
    """Numbers in the K/V cache per token: 2 · layers · key-value heads · head width, every layer with its own."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_width(config)


def training_flops_per_token(model: nn.Module, seq_len: int) -> int:
    """Three times `forward_flops_per_token`; recomputed activations are not counted."""
    return TRAINING_FACTOR * forward_flops_per_token(model, seq_len)


def active_weights(parameter: torch.Tensor, config: Any) -> int:
    """Weights that one token meets: all, of a layer's stacked experts those of the ones that it visits."""
    experts, visited = experts_of(parameter, config)
    return parameter.numel() // experts * visited
