"""Matching of budgets: how many parameters a branch trains, and which LoRA ranks train as many."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from preskip.errors import PreskipError

if TYPE_CHECKING:
    from torch import nn

    from preskip.branch_settings import BranchSettings

TOLERANCE = 0.005


@dataclass(frozen=True, kw_only=True)
class LoraRanks:
    """LoRA ranks that come to a number of parameters.

    Attributes:
        rank: of every target.
        rank_pattern: targets with one rank more, by module path.
        targets: all target paths.
        parameters: trainable parameters in total, Σ rank · (in + out).
    """

    rank: int
    rank_pattern: dict[str, int]
    targets: tuple[str, ...]
    parameters: int


def attention_paths(
    model: nn.Module,
    layers: tuple[int, ...] | None = None,
    target_modules: str | None = None,
    exclude_modules: str | None = None,
) -> list[str]:
    """Paths of the attention modules to adapt.

    Args:
        model: the base.
        layers: layer indices; None for all.
        target_modules: regular expression of whole paths; None for every self-attention of the text decoder.
        exclude_modules: regular expression of whole paths to leave out.

    Raises:
        PreskipError: the model cannot have these layers (`preskip.attach.check_layers`), or nothing is left.
    """
    from preskip.attach import check_layers, find_sites

    if target_modules is not None:
        paths = [path for path, _ in model.named_modules() if re.fullmatch(target_modules, path)]
    else:
        sites = find_sites(model)
        if exclude_modules is None:
            check_layers(model, sites, layers)
        paths = [site.name for site in sites.attentions if layers is None or site.layer in layers]
    if exclude_modules is not None:
        paths = [path for path in paths if not re.fullmatch(exclude_modules, path)]
    if not paths:
        raise PreskipError(
            f"no attention of {type(model).__name__} is left to adapt: the expressions must match "
            "whole paths, e.g. model\\.layers\\.[0-5]\\.self_attn"
        )
    return paths


def branch_parameters(model: nn.Module, settings: BranchSettings, targets: Sequence[str]) -> int:
    """Trainable parameters of a Preskip adapter: the branch's cost, summed over the target attentions."""
    return sum(settings.cost(target_width(model, path)).parameters for path in targets)


def target_width(model: nn.Module, path: str) -> int:
    """Width d of what the attention at `path` reads."""
    from preskip.attach import input_width, text_decoder

    hidden_size = getattr(getattr(text_decoder(model), "config", None), "hidden_size", None)
    return input_width(model.get_submodule(path), hidden_size)


def nearest_expansion(settings: BranchSettings, budget: int, widths: Sequence[int]) -> BranchSettings:
    """The same branch with the expansion that comes nearest to a number of parameters.

    Args:
        settings: the branch; its expansion is replaced.
        budget: parameters to come to, over all branches.
        widths: width d of each branch.

    Raises:
        PreskipError: it would take an expansion above 64.
    """
    d = widths[0]

    def with_inner(inner: int) -> BranchSettings:
        # Half a feature more than wanted, so that rounding ⌊expansion · d⌋ gives `inner` whatever the floats do.
        return replace(settings, expansion=(inner + 0.5) / d)

    one, two = (sum(with_inner(inner).cost(width).parameters for width in widths) for inner in (1, 2))
    inner = max(1, round(1 + (budget - one) / (two - one)))
    if inner > 64 * d - 1:
        raise PreskipError(
            f"{budget:,} parameters need an expansion above 64 in {len(widths)} layers: adapt more layers"
        )
    return with_inner(inner)


def match_expansion(model: nn.Module, settings: BranchSettings, budget: int, targets: Sequence[str]) -> BranchSettings:
    """`nearest_expansion` for the branches of some attentions of a model.

    Args:
        model: the base.
        settings: the branch; its expansion is replaced.
        budget: trainable parameters to come to, over all targets.
        targets: paths of the attention modules to adapt.

    Raises:
        PreskipError: the nearest possible number is more than 0.5 % away; it is named.
    """
    matched = nearest_expansion(settings, budget, [target_width(model, path) for path in targets])
    total = branch_parameters(model, matched, targets)
    if abs(total - budget) > TOLERANCE * budget:
        raise PreskipError(
            f"a branch cannot match {budget:,} parameters within 0.5 %: the nearest possible is {total:,}"
        )
    return matched


def lora_ranks(
    model: nn.Module, budget: int, targets: Sequence[str], *, magnitudes: float = 0.0, whole: int | None = None
) -> LoraRanks:
    """LoRA on every linear layer of the attentions (Q, K, V and output), with as many parameters as `budget`.

    One rank costs Σ (in + out) over the targets. The largest common rank that fits is raised by one for as many
    modules, first layers first, as still fit.

    Args:
        model: the base.
        budget: trainable parameters to come to.
        targets: paths of the attention modules to adapt.
        magnitudes: cost of DoRA's further weight per output, in parameters: 1 where parameters are counted, 0.5 where
            FLOPs are (one multiplication, against two FLOPs of every other weight), 0 for LoRA.
        whole: number of parameters that 0.5 % is of; None for the budget. LoRA may be a part of the arm.

    Raises:
        PreskipError: less than rank 1 fits, or the nearest possible number is more than 0.5 % away; it is named.
    """
    sizes: dict[str, int] = {}
    outputs = 0
    for name, shape in linear_shapes(model, targets).items():
        sizes[name] = sum(shape)
        outputs += shape[1]
    per_rank, fixed = sum(sizes.values()), round(magnitudes * outputs)
    rank = (budget - fixed) // per_rank
    if rank < 1:
        raise PreskipError(
            f"LoRA cannot match {budget:,} parameters: rank 1 has {fixed + per_rank:,}, the nearest possible. "
            "Raise --expansion, or leave the arm out"
        )
    total, pattern = fixed + rank * per_rank, {}
    for name, size in sizes.items():
        if total + size <= budget:
            pattern[name] = rank + 1
            total += size
    if abs(total - budget) > TOLERANCE * (whole or budget):
        raise PreskipError(
            f"LoRA cannot match {budget:,} parameters within 0.5 %: the nearest possible is {total:,}. "
            "Change --expansion, or leave the arm out"
        )
    return LoraRanks(rank=rank, rank_pattern=pattern, targets=tuple(sizes), parameters=total)


def linear_shapes(model: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer of the attentions (Q, K, V and output), by module path.

    Raises:
        PreskipError: there is none.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for path in targets:
        # BERT keeps the output projection beside `attention.self`.
        root = path.removesuffix(".self")
        for name, module in model.get_submodule(root).named_modules():
            shape = _linear_shape(module)
            if shape is not None:
                shapes[f"{root}.{name}"] = shape
    if not shapes:
        raise PreskipError(f"{type(model).__name__} has no linear layer in its attentions that LoRA could adapt")
    return shapes


def _linear_shape(module: Any) -> tuple[int, int] | None:
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        return module.weight.shape[0], module.weight.shape[1]
    return None
