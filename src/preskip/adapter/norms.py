"""PEFT's tuning of norms on a base in 16 bits: weights and steps in float32, what flows on in the base's dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def float32_norms(model: nn.Module) -> bool:
    """Train and run the norms of PEFT's LN tuning in float32, as PEFT itself does with every other kind of adapter.

    PEFT copies the base's norms with their dtype; in bfloat16 a weight near 1 moves by 1/128 or not at all. Each copy
    is cast, reads its input in float32, and gives its output in the input's dtype, which the next matrix expects.

    Args:
        model: with LN tuning somewhere inside, or without; it is changed in place. Before training, or before weights
            are loaded into it.

    Returns:
        Whether a norm was cast.
    """
    from peft.tuners.ln_tuning.layer import LNTuningLayer

    was_cast = False
    for layer in model.modules():
        if not isinstance(layer, LNTuningLayer):
            continue
        for norm in layer.ln_tuning_layers.values():
            if all(weight.dtype == torch.float32 for weight in norm.parameters()):
                continue
            was_cast = True
            norm.float()
            norm.register_forward_pre_hook(_in_float32)
            norm.register_forward_hook(_as_given)
    return was_cast


def _in_float32(norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *rest = args
    norm.given_dtype = x.dtype
    return (x.float(), *rest)


def _as_given(norm: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.to(norm.given_dtype)  # type: ignore[arg-type]
