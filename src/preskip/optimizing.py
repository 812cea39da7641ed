"""`preskip.optimize`: branches become a part of their attention's forward, with weights cast once and no hooks.

A hook costs Python at every call of every layer, and a compiled hook would cast fp32 weights at every call. The
arithmetic is that of the hooks, in the same order, on matrices that are cast and packed once.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from preskip.adapter import PreskipLayer
from preskip.attach import (
    CHILD,
    ELSEWHERE,
    add_skip,
    attach,
    detach,
    forget_compiled,
    hidden_states_of,
    replace_input,
    with_hidden_states,
)
from preskip.branch import FUNCTIONS, PreskipBranch
from preskip.branch_settings import BranchSettings
from preskip.casting import cast_of, cast_once, is_autocast, is_transformed, version_of
from preskip.quantizing import Int8Linear, PaddedInt8

_PLAN = "preskip_plan"


class Optimized:
    """What `optimize` returns: `remove()` puts the hooks back, as does the end of a `with` block.

    Attributes:
        attentions: how many attentions it has changed.
    """

    def __init__(self, changed: list[tuple[nn.Module, nn.Module]]) -> None:
        self._changed = changed
        self.attentions = len(changed)

    def remove(self) -> None:
        """Put the model back as it was, the branches' hooks behind those that others have added meanwhile; a second
        call does nothing.
        """
        for attention, branch in self._changed:
            if attention._modules.get(CHILD) is branch:  # not where the adapter was unloaded meanwhile
                detach(attention)
                attach(attention, branch)
        if self._changed:
            forget_compiled()
        self._changed = []

    def __enter__(self) -> Optimized:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def optimize(model: nn.Module) -> Optimized:
    """Make the branches of a model quicker at inference: no hooks, weights cast and packed once. Exact to rounding.

    Works on adapters and on `preskip_<type>` models, eager, with a static cache, under `torch.compile` and with CUDA
    graphs. While a model trains, has several adapters active or none, or runs under autocast, its attentions compute
    as before. An attention is left as it is where its branch joins behind another module (BERT,
    `skip_position="residual"`), where several adapters were baked side by side, and where it has hooks of others:
    transformers leaves some behind at the first call with `output_hidden_states=True`. A warning says so where nothing
    is left to change.

    Args:
        model: is changed in place. Compile it afterwards, and anew when its weights have changed. After writes
            that torch does not count (through `.data`, say), call `preskip.casting.forget`.

    Returns:
        A handle; `with preskip.optimize(model): ...` or `.remove()` undoes it.
    """
    changed: list[tuple[nn.Module, nn.Module]] = []
    with_branch = [module for module in model.modules() if CHILD in module._modules]
    for attention in with_branch:
        branch: Any = attention._modules[CHILD]
        if not isinstance(branch, (PreskipLayer, PreskipBranch)) or is_optimized(attention):
            continue
        own: Any = branch.hook_handles
        hooks = (*attention._forward_pre_hooks, *attention._forward_hooks)
        others = {handle.id for handle in own} != set(hooks) or attention._backward_hooks
        if others or attention._backward_pre_hooks or "forward" in attention.__dict__:
            continue
        for handle in own:
            handle.remove()
        attention.__dict__[_PLAN] = _plan(branch, _dtype_of(attention, branch))
        kind: Any = type(attention)
        attention.__class__ = _with_branch(kind)
        branch.hook_handles = [_InForward(attention)]  # type: ignore[assignment]
        changed.append((attention, branch))
    if with_branch and not any(map(is_optimized, with_branch)):
        warnings.warn(
            "no attention was optimised: the branches join behind other modules, lie side by side, or their attentions "
            "have hooks of others (as after output_hidden_states=True: optimise a freshly loaded model)",
            stacklevel=2,
        )
    return Optimized(changed)


def copies(model: nn.Module) -> list[torch.Tensor]:
    """Copies of its branches' weights that a model keeps to compute with, optimised or not: cast, packed, padded."""
    found: list[torch.Tensor | None] = []
    for module in model.modules():
        found.append(cast_of(module))
        plan: _Plan = module.__dict__.get(_PLAN) or _Plan()
        for product in plan.products.values():
            if isinstance(product, PaddedInt8):
                found += [product.weight, product.scale]
            elif isinstance(product, _Matrix):
                found.append(product.packed)
    return [tensor for tensor in found if tensor is not None]


def is_optimized(attention: nn.Module) -> bool:
    """Whether the branch is a part of its attention's forward now, so that hooks there see the sum of both."""
    return _PLAN in attention.__dict__


class _InForward:
    """In place of the handles of a branch's hooks: `detach` removes it with the branch, so no plan outlives one."""

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention

    def remove(self) -> None:
        """Give the attention its own class back."""
        self._attention.__class__ = type(self._attention).__mro__[1]
        del self._attention.__dict__[_PLAN]


class _Matrix:
    """A matrix to multiply by, on a processor in bfloat16 also in the layout of its products.

    There a product of few rows takes half the time, as oneDNN would else bring the matrix into that layout at every
    call. The packed product has no gradient, and no compiler knows it.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.packed: torch.Tensor | None = None
        if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and _packs_bfloat16():
            with torch.inference_mode(False), torch.no_grad():
                self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.packed is None:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


@cache
def _packs_bfloat16() -> bool:
    """Whether this torch and this processor have the packed product."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    has = torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
    return has and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass(kw_only=True)
class _Plan:
    """One branch made ready to compute in one dtype.

    Attributes:
        settings: of the branch; None where only the hooks' arithmetic will do.
        dtype: of the activations it is for.
        products: per part, what multiplies by it.
        sources: the layers and tensors that these are made of: where each is kept, its name there, itself, and of a
            tensor the version.
        adapters: the active adapters then.
    """

    settings: BranchSettings | None = None
    dtype: torch.dtype | None = None
    products: dict[str, Any] = field(default_factory=dict)
    sources: tuple[tuple[Any, str, Any, tuple[Any, ...] | None], ...] = ()
    adapters: list[str] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Plan:
        return _Plan()  # made anew at the copy's first call: what hangs on a weight in a graph cannot be copied

    def __reduce__(self) -> tuple[type[_Plan], tuple[()]]:
        return _Plan, ()

    def holds(self, branch: Any, x: torch.Tensor) -> bool:
        """Whether this is what the branch would compute for x now; a compiled graph takes weights as they were."""
        if self.dtype != x.dtype or getattr(branch, "_active_adapter", self.adapters) != self.adapters:
            return False
        return torch.compiler.is_compiling() or all(
            kept.get(name) is value and (version is None or version_of(value) == version)
            for kept, name, value, version in self.sources
        )


def _plan(branch: Any, dtype: torch.dtype | None) -> _Plan:
    """The plan for activations of a dtype; for None it is made anew at the first call."""
    adapters = list(getattr(branch, "_active_adapter", []))
    others = _Plan(dtype=dtype, adapters=adapters)
    if torch.compiler.is_compiling():
        return others  # a graph knows no versions
    if isinstance(branch, PreskipBranch):
        linears, settings = branch.linears, branch.settings
        places = {part: (branch._modules, part) for part in linears}
    else:
        active = [name for name in adapters if name in branch.settings]
        if len(active) != 1:
            return others
        linears, settings = branch.linears(active[0]), branch.settings[active[0]]
        places = {part: (branch._modules[part]._modules, active[0]) for part in linears}
    products: dict[str, Any] = {}
    sources: list[Any] = []
    for part, linear in linears.items():
        weight: Any = linear._parameters.get("weight")
        tensors = [
            (kept, name, tensor)
            for kept in (linear._parameters, linear._buffers)
            for name, tensor in kept.items()
            if tensor is not None
        ]
        if any(tensor.is_inference() or tensor.is_meta for *_, tensor in tensors):
            return others  # without versions, or offloaded
        sources.append((*places[part], linear, None))
        sources += [(*place, version_of(place[-1])) for place in tensors]
        if isinstance(linear, Int8Linear) and dtype in (torch.bfloat16, torch.float32):
            # The inner width may stay padded: every activation of 0 is 0.
            wide = part in ("up", "gate")
            has_kernel = dtype == torch.bfloat16 and linear.weight.device.type == "cpu"
            products[part] = PaddedInt8(linear, wide=wide) if has_kernel else linear
        elif (
            type(linear) is not nn.Linear
            or linear._forward_hooks
            or linear._forward_pre_hooks
            or type(weight) is not nn.Parameter
        ):
            return others  # adapted, observed, or sharded
        elif weight.dtype == dtype:
            products[part] = _Matrix(weight)
        elif dtype == torch.bfloat16:
            cast = cast_once(linear, weight, dtype)
            if weight.is_cuda:  # else a CUDA graph would copy it at every call
                torch._dynamo.mark_static_address(cast)
            products[part] = _Matrix(cast)
        else:
            return others
    return _Plan(settings=settings, dtype=dtype, products=products, sources=tuple(sources), adapters=adapters)


def _dtype_of(attention: nn.Module, branch: nn.Module) -> torch.dtype | None:
    """What an attention computes in, by its own weights; None where these are packed."""
    own = {id(p) for p in branch.parameters()}
    weight = next((p for p in attention.parameters() if id(p) not in own), None)
    return weight.dtype if weight is not None and weight.is_floating_point() else None


@cache
def _with_branch(kind: Any) -> Any:
    """The class of an attention whose forward holds its branch."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        branch: Any = self._modules[CHILD]
        x = hidden_states_of(args, kwargs)
        plan = self.__dict__[_PLAN]
        if not torch.compiler.is_compiling() and (is_transformed() or torch.jit.is_tracing()):
            plan = _Plan()
        elif not plan.holds(branch, x):
            plan = _plan(branch, x.dtype)
            if not torch.compiler.is_compiling():
                self.__dict__[_PLAN] = plan
        if (
            plan.settings is None
            or self.training
            or getattr(branch, "_disable_adapters", False)
            or getattr(branch, "row_names", None) is not None
            or is_autocast(x.device)
            or any(kwargs.get(name) is not None for name in ELSEWHERE)
        ):
            args, kwargs = replace_input(self, args, kwargs)
            return add_skip(self, args, kwargs, kind.forward(self, *args, **kwargs))
        products = plan.products
        feature = _feature(x, plan) if "down" in products else None
        enriched = x if feature is None else x + feature
        if plan.settings.enrich_attention:
            args, kwargs = with_hidden_states(args, kwargs, enriched)
        output = kind.forward(self, *args, **kwargs)
        if "skip" in products:
            skip = products["skip"](enriched)
        elif "skip_up" in products:
            skip = products["skip_up"](products["skip_down"](enriched))
        elif plan.settings.enrich_attention:
            return output
        else:
            skip = feature
        return (output[0] + skip, *output[1:]) if isinstance(output, tuple) else output + skip

    def apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        kind._apply(self, fn, recurse)
        branch: Any = self._modules[CHILD]
        self.__dict__[_PLAN] = _plan(branch, _dtype_of(self, branch))  # the last holds copies of weights as they were
        return self

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _of_class, (kind,), self.__dict__

    methods = {"forward": forward, "_apply": apply, "__reduce_ex__": reduce, "__module__": __name__}
    return type(f"Optimized{kind.__name__}", (kind,), methods)


def _of_class(kind: Any) -> nn.Module:
    """An attention to be filled by pickle, which looks classes up by name and finds none that is made here."""
    made = _with_branch(kind)
    return made.__new__(made)


def _feature(x: torch.Tensor, plan: _Plan) -> torch.Tensor:
    """W_down · σ(W_up · x̂), as `preskip.branch.feature`."""
    products, settings = plan.products, plan.settings
    assert settings is not None
    inner = FUNCTIONS[settings.activation](products["gate" if "gate" in products else "up"](x))
    if "gate" in products:
        inner = inner * products["up"](x)
    return products["down"](inner)
