"""The matrix products of scoring on processors whose float32 kernels leave half of their width idle."""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import torch
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from preskip.runs.environment import processor_name


class OneDnnLinear(TorchFunctionMode):
    """Linear layers in float32 through oneDNN, without gradients; everything else, and autocast, as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_linear = func is torch.nn.functional.linear and not kwargs
        if is_linear and all(map(_taken, args)) and not torch.is_autocast_enabled("cpu"):
            inputs, weight, bias = (*args, None)[:3]
            return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _taken(tensor: Any) -> bool:
    return tensor is None or (
        type(tensor) in (torch.Tensor, Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.numel() > 0
    )


@cache
def _narrow_products() -> bool:
    """Whether torch's library for float32 (MKL) uses half the width here, as on AMD's processors with AVX-512.

    Measured on one core of an AMD EPYC: 110 GFLOP/s with it, 245 with oneDNN, from 64 rows on.
    """
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AMD" in processor_name()
    )


def scoring_kernels() -> contextlib.AbstractContextManager[Any]:
    """The fastest kernels for scoring on this machine; their results differ in the last digits."""
    return OneDnnLinear() if _narrow_products() else contextlib.nullcontext()
