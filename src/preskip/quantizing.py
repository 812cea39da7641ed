"""int8 weights of a branch, one scale per output: half of bfloat16's bytes, activations as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

QUANTIZED = ("int8",)
# torch's kernel for int8 weights takes bfloat16 activations of few rows; more multiply faster by a converted matrix.
_FEW_ROWS = 8
# It reads whole vectors, past the end of a matrix whose sides are no multiples of one.
_VECTOR = 64


def packed_weights(model: nn.Module) -> int:
    """How many weights the branches' int8 matrices hold, which are no parameters of the model."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, Int8Linear))


class Int8Linear(nn.Module):
    """x · Wᵀ with W = scale · weight, [..., in] → [..., out] in the dtype of x.

    Args:
        in_features: in.
        out_features: out.
        device: where to allocate.

    Attributes:
        weight: int8, [out, in].
        scale: [out], in the dtype of the model.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(out_features, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product; float16 is computed in float32, as its inner features may overflow."""
        if x.dtype == torch.float16:
            x = x.float()
        scale = self.scale.to(x.dtype)
        if takes_kernel(x) and self.in_features % _VECTOR == 0 and self.out_features % _VECTOR == 0:
            flat = torch._weight_int8pack_mm(x.reshape(-1, self.in_features), self.weight, scale)
            return flat.view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.weight.to(x.dtype)) * scale

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def takes_kernel(x: torch.Tensor) -> bool:
    """Whether torch's kernel for int8 weights takes these activations now, and is the quicker way."""
    is_eager_inference = not (torch.compiler.is_compiling() or torch.is_grad_enabled())
    few = x.numel() <= _FEW_ROWS * x.shape[-1]
    return is_eager_inference and few and x.dtype == torch.bfloat16 and x.device.type == "cpu"


class PaddedInt8:
    """The product of an `Int8Linear` with its matrix copied once to sides that torch's kernel can read.

    Args:
        linear: the layer; it computes what the kernel does not take.
        wide: whether the kernel's outputs keep the zeros behind them, for another product that takes them so.
    """

    def __init__(self, linear: Int8Linear, *, wide: bool = False) -> None:
        self.linear, self.wide = linear, wide
        columns, rows = -linear.in_features % _VECTOR, -linear.out_features % _VECTOR
        self.weight = F.pad(linear.weight, (0, columns, 0, rows))
        self.scale = F.pad(linear.scale.to(torch.bfloat16), (0, rows))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out], as the layer; x may have the zeros of a wide product behind it."""
        if not takes_kernel(x):
            return self.linear(x)
        flat = x.reshape(-1, x.shape[-1])
        if missing := self.weight.shape[1] - flat.shape[1]:
            flat = F.pad(flat, (0, missing))
        flat = torch._weight_int8pack_mm(flat, self.weight, self.scale)
        return (flat if self.wide else flat[:, : self.linear.out_features]).view(*x.shape[:-1], -1)


def quantize(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix [out, in] to int8, symmetric, each row to its own largest entry.

    Args:
        weight: the matrix.
        dtype: in which the scales are stored. They are rounded to it first, so that this costs no accuracy.

    Returns:
        The int8 matrix [out, in] and the scales [out].
    """
    scale = (weight.float().abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).to(dtype)
    rounded = (weight.float() / scale.float()[:, None]).round().clamp(-127, 127)
    return rounded.to(torch.int8), scale


def float_weight(linear: nn.Linear | Int8Linear) -> torch.Tensor:
    """The matrix [out, in] that a layer multiplies by, in float32."""
    weight = linear.weight.detach().float()
    return weight * linear.scale.float()[:, None] if isinstance(linear, Int8Linear) else weight


def quantize_layers(branch: Any) -> None:
    """Put int8 layers of the same sizes in place of a branch's matrices; their weights come from a checkpoint."""
    for part, linear in branch.linears.items():
        branch.add_module(part, Int8Linear(linear.in_features, linear.out_features, device=linear.weight.device))
