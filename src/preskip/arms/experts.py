"""A mixture's experts: which weights they are, and what of them PEFT's low-rank arms leave out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

# What transformers' configs call the experts of a layer, and those that a token visits.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_VISITED = ("num_experts_per_tok", "top_k_experts")
# Arms that are said to sit on all linear layers, or on those outside attention.
_ON_LINEAR = ("lora", "lora-mlp", "dora", "rslora", "hira")


def experts_of(parameter: torch.Tensor, config: Any) -> tuple[int, int]:
    """How many experts a weight holds, and how many of them a token visits; 1 and 1 of any other weight.

    transformers stacks the experts of a layer in one tensor [experts, out, in]; a convolution has three dimensions,
    too.
    """
    visited = next((n for name in _VISITED if (n := getattr(config, name, None))), None)
    is_stack = parameter.ndim == 3 and parameter.shape[0] in [getattr(config, name, None) for name in _EXPERTS]
    return (parameter.shape[0], visited) if visited and is_stack else (1, 1)


def stacked_share(model: nn.Module, config: Any) -> float:
    """Share of a model's weights that are experts stacked in one tensor, which is no linear layer; 0 of a dense one."""
    sizes = [(weight.numel(), experts_of(weight, config)[0]) for weight in model.parameters()]
    return sum(size for size, experts in sizes if experts > 1) / max(1, sum(size for size, _ in sizes))


def experts_note(share: float, arms: Sequence[str]) -> str | None:
    """What to say of a mixture whose arms include some of LoRA's kind; None of a dense model."""
    concerned = [arm for arm in arms if arm in _ON_LINEAR]
    if not share or not concerned:
        return None
    sit = "sits" if len(concerned) == 1 else "sit"
    return (
        f"{share:.0%} of the model's weights are experts stacked in one tensor, where PEFT's arms find no linear "
        f"layer: {', '.join(concerned)} {sit} on what else is linear"
    )
