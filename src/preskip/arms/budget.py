"""Matching of budgets: how many parameters a branch trains, and which LoRA ranks train as many."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from preskip.branch_settings import ATTENTION_LAYERS
from preskip.errors import PreskipError

if TYPE_CHECKING:
    from torch import nn

    from preskip.branch_settings import BranchSettings

TOLERANCE = 0.005
# Where LoRA may sit, in words.
PARTS = {"attention": "attentions", "all": "blocks", "mlp": "blocks outside attention"}


@dataclass(frozen=True, kw_only=True)
class LoraRanks:
    """LoRA ranks that come to a number of parameters.

    Attributes:
        rank: of every target that `rank_pattern` does not name.
        rank_pattern: rank of the others, by module path: one more, or capped at the smaller side.
        targets: all target paths.
        parameters: trainable parameters in total, Σ rank · (in + out).
    """

    rank: int
    rank_pattern: dict[str, int]
    targets: tuple[str, ...]
    parameters: int


def attention_layers(model: nn.Module, layers: tuple[int | str, ...] | None) -> tuple[int, ...] | None:
    """The layer indices that `--layers` means: `("attention",)` is every layer that has attention, None stays.

    Raises:
        PreskipError: the model has no known attention.
    """
    from preskip.sites import find_sites

    if layers == (ATTENTION_LAYERS,):
        return tuple(find_sites(model).layers)
    return layers  # type: ignore[return-value]


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
        PreskipError: the model cannot have these layers (`preskip.sites.check_layers`), or nothing is left.
    """
    from preskip.sites import check_layers, find_sites

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
    from preskip.sites import input_width, text_decoder

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
    shapes: Mapping[str, tuple[int, int]],
    budget: int,
    *,
    magnitudes: float = 0.0,
    whole: int | None = None,
    common: bool = False,
) -> LoraRanks:
    """LoRA on linear layers, with as many parameters as `budget`.

    One rank of a layer costs in + out. No layer gets a higher rank than min(in, out), beyond which weights add
    nothing. The largest common rank that fits is raised by one for as many layers, first ones first, as still fit.

    Args:
        shapes: (in, out) by module path, as from `linear_shapes`.
        budget: trainable parameters to come to.
        magnitudes: cost of DoRA's further weight per output, in parameters: 1 where parameters are counted, 0.5 where
            FLOPs are (one multiplication, against two FLOPs of every other weight), 0 for LoRA.
        whole: number of parameters that 0.5 % is of; None for the budget. LoRA may be a part of the arm.
        common: one rank for all layers, neither raised nor capped.

    Raises:
        PreskipError: less than rank 1 fits, or the nearest possible number is more than 0.5 % away; it is named.
    """
    fixed = round(magnitudes * sum(shape[1] for shape in shapes.values()))
    caps = {name: budget if common else min(shape) for name, shape in shapes.items()}

    def cost(rank: int) -> int:
        return fixed + sum(min(rank, caps[name]) * sum(shape) for name, shape in shapes.items())

    if cost(1) > budget:
        raise PreskipError(
            f"LoRA cannot match {budget:,} parameters: rank 1 has {cost(1):,}, the nearest possible. "
            "Raise --expansion, or leave the arm out"
        )
    rank = bisect_right(range(1, max(caps.values()) + 1), budget, key=cost)
    total = cost(rank)
    pattern = {name: cap for name, cap in caps.items() if cap < rank}
    for name, shape in shapes.items():
        if not common and rank < caps[name] and total + sum(shape) <= budget:
            pattern[name] = rank + 1
            total += sum(shape)
    if abs(total - budget) > TOLERANCE * (whole or budget):
        raise PreskipError(
            f"LoRA cannot match {budget:,} parameters within 0.5 %: the nearest possible is {total:,}. "
            "Change --expansion, or leave the arm out"
        )
    return LoraRanks(rank=rank, rank_pattern=pattern, targets=tuple(shapes), parameters=total)


def linear_shapes(model: nn.Module, targets: Sequence[str], part: str = "attention") -> dict[str, tuple[int, int]]:
    """(in, out) of linear layers, by module path.

    Args:
        model: the base.
        targets: paths of attention modules.
        part: "attention": those of these attentions (Q, K, V and output); "all": those of the blocks that they are in;
            "mlp": the blocks' without the attentions'.

    Raises:
        PreskipError: there is none.
    """
    # BERT keeps the output projection beside `attention.self`.
    attentions = [path.removesuffix(".self") for path in targets]
    within = _linear_layers(model, attentions)
    if part != "attention":
        blocks = _linear_layers(model, list(dict.fromkeys(block_of(path) for path in targets)))
        within = {name: shape for name, shape in blocks.items() if part == "all" or name not in within}
    if not within:
        raise PreskipError(f"{type(model).__name__} has no linear layer in its {PARTS[part]} that LoRA could adapt")
    return within


def block_of(path: str) -> str:
    """Path of the block that a module is in: of `model.layers.3.self_attn` it is `model.layers.3`."""
    found = re.match(r".*?\.\d+(?=\.|$)", path)
    return found.group() if found else path.rpartition(".")[0]


def _linear_layers(model: nn.Module, roots: Sequence[str]) -> dict[str, tuple[int, int]]:
    shapes = {}
    for root in roots:
        for name, module in model.get_submodule(root).named_modules():
            shape = _linear_shape(module)
            if shape is not None:
                shapes[f"{root}.{name}"] = shape
    return shapes


def _linear_shape(module: Any) -> tuple[int, int] | None:
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        return module.weight.shape[0], module.weight.shape[1]
    return None
