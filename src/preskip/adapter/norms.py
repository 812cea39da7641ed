"""PEFT's tuning of norms on a base in 16 bits: weights and steps in float32, what flows on in the base's dtype."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn


def float32_norms(model: nn.Module) -> bool:
    """Train and run the norms of PEFT's LN tuning in float32, as PEFT does with its other adapters' weights.

    PEFT copies the base's norms and leaves LN tuning out of its cast to float32, because what follows a norm expects
    the base's dtype. But in bfloat16 a weight near 1 moves by 1/256 at least, or not at all. Here each copy is cast,
    reads its input in float32, and gives its output in the base's dtype.

    Args:
        model: with LN tuning somewhere inside, or without; it is changed in place. Before training, or before weights
            are loaded into it.

    Returns:
        Whether a norm was cast.
    """
    from peft.tuners.ln_tuning.layer import LNTuningLayer

    layers = [module for module in model.modules() if isinstance(module, LNTuningLayer)]
    norms = [norm for layer in layers for norm in layer.ln_tuning_layers.values()]
    cast = [norm for norm in norms if next(norm.parameters()).dtype != torch.float32]
    for norm in cast:
        norm.register_forward_pre_hook(_in_float32)
        norm.register_forward_hook(partial(_given_in, next(norm.parameters()).dtype))
        norm.float()
    return bool(cast)


def _in_float32(norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].float(), *args[1:])


def _given_in(dtype: torch.dtype, norm: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    return output.to(dtype)
