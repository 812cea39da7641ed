"""Where a model has self-attention, for every family: the sites, the choice of layers, coverage. Knows no branch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from preskip.branch_settings import ATTENTION_LAYERS
from preskip.errors import PreskipError, some

# Paths under which a block holds its self-attention, most specific first. T5's blocks are lists of parts; Zamba's share
# one transformer among several layers.
ATTENTION_NAMES = (
    "self_attn", "self_attention", "attention", "attn", "layer.0.SelfAttention", "layer.0.LocalSelfAttention",
    "layer.0.TransientGlobalSelfAttention", "shared_transformer.self_attn", "shared_transf.self_attn",
)  # fmt: skip

# Names for whatever mixes the tokens of a block: attention only where the class says so (Nemotron-H, RecurrentGemma).
MIXER_NAMES = ("mixer", "temporal_block")

# What transformers' configs call layers whose mixing of tokens is no attention, whatever their modules are called.
OTHER_LAYERS = ("linear_attention", "conv", "moe", "mamba", "recurrent")

# Linear layers that read an attention's hidden_states, to learn its width from; Conv1D (GPT-2) stores its transpose.
INPUT_PROJECTIONS = (
    "q_proj", "qkv_proj", "query_key_value", "query", "Wqkv", "c_attn", "q_a_proj", "qkv", "in_proj", "wqkv", "W_pack",
    "q", "q_lin", "query_proj",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One place where a branch can sit.

    Attributes:
        name: path of the attention module in the model, e.g. `model.layers.3.self_attn`.
        target: the path relative to its block, e.g. `self_attn` or `attention.self`.
        stack: path of the list of blocks, e.g. `model.layers`.
        layer: index of the block in its stack.
    """

    name: str
    target: str
    stack: str
    layer: int


@dataclass(frozen=True, kw_only=True)
class Sites:
    """All sites of a model, and the blocks of the same stacks that have no recognised attention."""

    attentions: tuple[AttentionSite, ...]
    blocks_without: tuple[str, ...]

    @property
    def layers(self) -> list[int]:
        """Layer indices that have a site, ascending."""
        return sorted({site.layer for site in self.attentions})


def text_decoder(model: nn.Module) -> nn.Module:
    """The submodule whose attentions are adapted by default: the text decoder of a multimodal model, else the model.

    An encoder-decoder model is taken as a whole; so is one whose `get_decoder()` is something else (the output head of
    a masked language model).
    """
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not isinstance(decoder, nn.Module) or not hasattr(decoder, "config") or is_encoder_decoder:
        return model
    return decoder


def find_sites(model: nn.Module) -> Sites:
    """Find the self-attention of every block of the model's text decoder.

    A stack is an `nn.ModuleList` in which at least one block has a child of a known attention name. Stacks of towers of
    pictures or sound that `text_decoder` cannot tell apart are left out (`_of_text`).

    Raises:
        PreskipError: no block has one; the message lists the children of the model's stacks.
    """
    decoder = text_decoder(model)
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    sites: list[AttentionSite] = []
    without: list[str] = []
    seen: dict[str, list[str]] = {}
    for path, stack in decoder.named_modules():
        if not isinstance(stack, nn.ModuleList) or len(stack) == 0:
            continue
        stack_name = ".".join(part for part in (prefix, path) if part)
        kinds_of = getattr(getattr(decoder, "config", None), "layer_types", None) or ()
        others = {i for i, kind in enumerate(kinds_of) if kind in OTHER_LAYERS} if len(kinds_of) == len(stack) else ()
        targets = [None if index in others else _attention_of(block) for index, block in enumerate(stack)]
        if not any(targets):
            kinds = sorted({f"({kinds_of[index]})" for index in others})
            seen[stack_name] = [*(name for name, _ in stack[0].named_children()), *kinds]
            continue
        for index, target in enumerate(targets):
            if target is None:
                without.append(f"{stack_name}.{index}")
            else:
                name = f"{stack_name}.{index}.{target}"
                sites.append(AttentionSite(name=name, target=target, stack=stack_name, layer=index))
    if not sites:
        found = "; ".join(f"{name}: {', '.join(children) or 'no children'}" for name, children in seen.items())
        names = ", ".join(name for name in ATTENTION_NAMES if "." not in name)
        raise PreskipError(
            f"no self-attention found in {type(model).__name__} (looked for {names} in its "
            f"blocks{f'; found {found}' if found else ''}): name the modules with target_modules, if it has any"
        )
    kept = _of_text(model, decoder, {site.stack for site in sites})
    return Sites(
        attentions=tuple(site for site in sites if site.stack in kept),
        blocks_without=tuple(block for block in without if block.rpartition(".")[0] in kept),
    )


def _of_text(model: Any, decoder: Any, stacks: set[str]) -> set[str]:
    """The stacks whose innermost model has a config of the text's type (of either side's); all, where no type tells."""
    try:
        sides = [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else [decoder]
        wanted = {type(side.config.get_text_config()) for side in sides}
    except (AttributeError, ValueError):  # no config, or one of two texts
        return stacks
    found = {stack: type(_config_around(model, stack)) for stack in stacks}
    return {stack for stack, kind in found.items() if kind in wanted} if wanted <= set(found.values()) else stacks


def _config_around(model: nn.Module, path: str) -> Any:
    while path and not hasattr(model.get_submodule(path), "config"):
        path = path.rpartition(".")[0]
    return getattr(model.get_submodule(path), "config", None)


def site_of(model: nn.Module, name: str) -> AttentionSite:
    """The place of an attention that was chosen by its path, whatever it is called.

    Args:
        model: holds it.
        name: its path.

    Raises:
        PreskipError: it lies in no list of blocks, so it has no layer.
    """
    parts = name.split(".")
    # The innermost list that holds it by a number; T5's blocks are lists of parts themselves, and found by name.
    try:
        known = next((site for site in find_sites(model).attentions if site.name == name), None)
    except PreskipError:
        known = None
    if known is not None:
        return known
    for end in range(len(parts) - 2, 0, -1):
        stack = ".".join(parts[:end])
        if isinstance(model.get_submodule(stack), nn.ModuleList):
            return AttentionSite(name=name, target=".".join(parts[end + 1 :]), stack=stack, layer=int(parts[end]))
    raise PreskipError(f"{name} lies in no list of blocks, so it has no layer: a branch cannot sit there")


def _attention_of(block: nn.Module) -> str | None:
    for name in (*ATTENTION_NAMES, *MIXER_NAMES):
        found = _descendant(block, name)
        if found is None or (name in MIXER_NAMES and not type(found).__name__.endswith("Attention")):
            continue
        if next(tensors_of(found), None) is None:
            return None
        return f"{name}.self" if {"self", "output"} <= {child for child, _ in found.named_children()} else name
    return None


def tensors_of(module: nn.Module) -> Iterator[torch.Tensor]:
    """Parameters and buffers: GPTQ keeps packed weights as buffers."""
    return chain(module.parameters(), module.buffers())


def _descendant(block: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = block
    for part in path.split("."):
        found = found._modules.get(part) if found is not None else None
    return found


def input_width(attention: nn.Module, default: int | None = None) -> int:
    """Width d of the `hidden_states` that an attention module reads.

    Args:
        attention: the module.
        default: used when no known input projection is found, e.g. the config's hidden_size.

    Raises:
        PreskipError: neither tells the width.
    """
    for name, module in attention.named_modules():
        if name.rpartition(".")[2] not in INPUT_PROJECTIONS:
            continue
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        if hasattr(base, "in_features"):
            return base.in_features
        if type(base).__name__ == "Conv1D":
            return base.weight.shape[0]
    if default is None:
        raise PreskipError(f"the input width of {type(attention).__name__} is unknown: its projections have new names")
    return default


def check_layers(model: nn.Module, sites: Sites, layers: Sequence[int] | None) -> None:
    """Refuse a choice of layers that the model cannot have.

    Args:
        model: named in the message.
        sites: the model's sites.
        layers: the chosen layer indices, or None for all.

    Raises:
        PreskipError: a layer that does not exist or has no attention, no layer at all, or None on a model in which
            some blocks have no known self-attention.
    """
    if layers is None:
        if sites.blocks_without:
            raise PreskipError(
                f"{type(model).__name__} has blocks without a known self-attention: "
                f"{some(list(sites.blocks_without))}; give layers_to_transform={sites.layers} or "
                f"layers_to_transform={ATTENTION_LAYERS!r} to adapt only the others"
            )
    elif not layers or not set(layers) <= set(sites.layers):
        first, last = sites.layers[0], sites.layers[-1]
        available = f"{first} to {last}" if sites.layers == list(range(first, last + 1)) else f"{sites.layers}"
        raise PreskipError(
            f"layers_to_transform={list(layers)} is not possible: {type(model).__name__} has attention in layers "
            f"{available}"
        )


def choose_layers(model: nn.Module, sites: Sites, layers: Sequence[int] | str | None) -> list[int] | None:
    """Layer indices, checked (`check_layers`); `ATTENTION_LAYERS` becomes those that have attention, None stays.

    Raises:
        PreskipError: as `check_layers`, or another text.
    """
    if isinstance(layers, str) and layers != ATTENTION_LAYERS:
        raise PreskipError(
            f"layers_to_transform={layers!r} is not possible: give layer indices or {ATTENTION_LAYERS!r}"
        )
    chosen = None if layers is None else sites.layers if isinstance(layers, str) else list(layers)
    check_layers(model, sites, chosen)
    return chosen


def coverage(names: Iterable[str], sites: Sites, layers: Iterable[int]) -> str:
    """One line that says what is amiss; empty when each site of the chosen layers gets exactly one branch.

    Args:
        names: paths of the modules that would get a branch.
        sites: the model's sites.
        layers: the layers that should have one.
    """
    found, chosen = set(names), set(layers)
    expected = {site.name for site in sites.attentions if site.layer in chosen}
    problems = []
    if missing := sorted(expected - found):
        problems.append(f"{len(missing)} of {len(expected)} attentions get no branch ({some(missing)})")
    if strays := sorted(found - expected):
        problems.append(f"matched outside the chosen layers or twice in one ({some(strays)})")
    return "; ".join(problems)
