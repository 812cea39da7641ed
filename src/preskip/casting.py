"""Products in the dtype of the activations with weights that are kept in fp32: one cast per weight and optimiser step.

A branch beside a bfloat16 base that computed in fp32 would read twice the bytes and, on a GPU, run at a twelfth of the
rate. Its masters stay fp32, because in bfloat16 they do not move at lr 1e-5; what is multiplied is a copy that is made
once, also over micro-batches and the recomputation of gradient checkpointing, and made anew when a weight has changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from preskip.quantizing import Int8Linear

_CAST = "_preskip_cast"
# Optimiser steps so far, of any optimiser: sharded training changes weights without counting it on the tensor.
_steps = 0


def forget() -> None:
    """Cast and pack every weight of a branch anew at its next use; to be called after writes that torch does not count.

    torch counts `weight.copy_(average)`, but not writes through `.data` (`weight.data.copy_(average)`) or through a
    NumPy view, nor what a collective of `torch.distributed` puts into a weight (`broadcast(weight, 0)`). Every
    optimiser's step calls this itself, and so does `load_state_dict` where there is a branch.
    """
    global _steps
    _steps += 1


def forget_on_load(module: nn.Module) -> None:
    """Let `load_state_dict` into a module, by itself or as a part, call `forget`: `fully_shard` keeps versions."""
    module.register_load_state_dict_pre_hook(_count_load)


def _count_load(module: nn.Module, *args: Any) -> None:
    forget()


def _count_step(optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    forget()


register_optimizer_step_post_hook(_count_step)


class _Cast:
    """The copy of one weight, kept beside the module that owns it; a copy of the module begins without."""

    def __init__(self) -> None:
        # Weight, key and copy in one, so that no thread reads those of two.
        self.made: tuple[torch.Tensor, tuple[Any, ...], torch.Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Cast:
        return _Cast()

    def __reduce__(self) -> tuple[type[_Cast], tuple[()]]:
        return _Cast, ()


def product(x: torch.Tensor, linear: nn.Module) -> torch.Tensor:
    """x · Wᵀ, [..., in] → [..., out], in bfloat16 where x is, else in the weight's dtype; autocast chooses by itself.

    float16 is computed in the weight's dtype: inner features of a branch may exceed its 65,504.

    Args:
        x: activations of any dtype.
        linear: a layer without bias; of another kind than `nn.Linear` (quantised, or with an adapter on it) it is
            called as it is.
    """
    weight: Any = linear.weight
    if isinstance(linear, Int8Linear):
        return linear(x)
    if is_autocast(x.device):
        return linear(x)
    if x.dtype == weight.dtype or x.dtype != torch.bfloat16 or type(linear) is not nn.Linear:
        return linear(x.to(weight.dtype))
    if weight.is_meta and not x.is_meta:  # offloaded: accelerate fetches it for the layer's own forward alone
        return linear(x.to(weight.dtype)).to(x.dtype)
    # A kept copy would be a constant in a graph or trace, cut off from its weight.
    is_recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    cast = weight.to(x.dtype) if is_recorded else cast_once(linear, weight, x.dtype)
    observers = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    if any(observers):  # whoever observes the layer sees what is computed
        return torch.func.functional_call(linear, {"weight": cast}, (x,))
    return F.linear(x, cast)


def is_autocast(device: torch.device) -> bool:
    """Whether autocast chooses the dtype of products there; torch cannot be asked about meta."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def is_transformed() -> bool:
    """Whether `torch.func` transforms what runs: tensors made meanwhile must not outlive the transform."""
    return torch._C._are_functorch_transforms_active()


def cast_once(linear: nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight in another dtype, from the last call where it has not changed since.

    The copy hangs on its weight in autograd's graph, where a cast keeps nothing for the backward pass: any number of
    backward passes go through it, and their gradients add up in fp32.
    """
    is_sharded = type(weight) not in (nn.Parameter, torch.Tensor)
    if is_sharded or weight.is_inference() or is_transformed():  # without a version, or gone with its transform
        return weight.to(dtype)
    held: _Cast | None = linear.__dict__.get(_CAST)
    if held is None:
        held = linear.__dict__[_CAST] = _Cast()
    key = (*version_of(weight), weight.requires_grad, dtype)
    # The weight is kept: one handed in for a call (`torch.func.functional_call`) would leave its address to the next.
    if held.made is not None and held.made[0] is weight and held.made[1] == key:
        return held.made[2]
    # As in training, whatever the mode of this call: recomputation comes without gradients first.
    with torch.inference_mode(False), torch.set_grad_enabled(weight.requires_grad):
        cast = weight.to(dtype)
    if type(cast) is torch.Tensor:  # not what a mode has put in its place, such as a tensor without values
        held.made = weight, key, cast
    return cast


def drop_casts(module: nn.Module) -> None:
    """Drop the copies that `cast_once` keeps beside a module's layers; to be called where its weights are moved."""
    for layer in module.modules():
        layer.__dict__.pop(_CAST, None)


def cast_of(linear: nn.Module) -> torch.Tensor | None:
    """The copy that `cast_once` keeps beside a layer, or None."""
    held: _Cast | None = linear.__dict__.get(_CAST)
    return None if held is None or held.made is None else held.made[2]


def version_of(weight: torch.Tensor) -> tuple[Any, ...]:
    """What tells a weight from itself before it was changed, moved or given other storage, but for `forget`'s cases.

    After `weight.data = other` the next storage may get the address of the last: the weak reference keeps them apart.
    """
    return StorageWeakRef(weight.untyped_storage()), weight.data_ptr(), weight.device, weight._version, _steps
