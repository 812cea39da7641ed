"""Which modules of one model an adapter's config means: what is left open filled in, what does not fit refused."""

from __future__ import annotations

import copy
import re
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from preskip.adapter.config import PreskipConfig
from preskip.branch import PARTS
from preskip.errors import PreskipError
from preskip.sites import ATTENTION_NAMES, INPUT_PROJECTIONS, Sites, find_sites

# Tasks for which PEFT adds the usual names of a head to `modules_to_save`.
HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
# Fields of a config that are filled in for one model.
FILLED_IN = ("target_modules", "layers_to_transform", "layers_pattern")


def remember_given(config: Any, given: dict[str, Any]) -> None:
    """Note what a config had in the fields that were filled in for a model; the note is no field, and never saved."""
    config._filled_in = {name: (given[name], getattr(config, name)) for name in FILLED_IN}


def as_given(config: Any) -> Any:
    """The config; of one that a model has already a copy, without what was filled in for that model's layers."""
    if not hasattr(config, "_filled_in"):
        return config
    other = copy.deepcopy(config)
    for name, (given, resolved) in config._filled_in.items():
        if getattr(config, name) == resolved:
            setattr(other, name, given)
    return other


def layer_list(config: PreskipConfig) -> Any:
    """`layers_to_transform` with a single index as a list of one."""
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else layers


def of_pattern(sites: Sites, pattern: list[str] | str | None) -> Sites:
    """The sites in the lists of blocks that `layers_pattern` names, as PEFT reads it; all without one."""
    if not pattern:
        return sites
    named = re.compile(rf"(.*\.)?({'|'.join([pattern] if isinstance(pattern, str) else pattern)})")
    stacks = {site.stack for site in sites.attentions}
    kept = {stack for stack in stacks if named.fullmatch(stack)}
    if not kept:
        raise PreskipError(f"layers_pattern={pattern!r} is no list of blocks: choose among {', '.join(sorted(stacks))}")
    return Sites(
        attentions=tuple(site for site in sites.attentions if site.stack in kept),
        blocks_without=tuple(block for block in sites.blocks_without if block.rpartition(".")[0] in kept),
    )


def set_default_targets(model: nn.Module, sites: Sites, config: PreskipConfig) -> None:
    """Fill `target_modules`: names where PEFT hits only the sites by them, else a regular expression.

    Names are not enough where a vision tower has them too, or where the blocks lie at the root of the model.
    """
    layers = layer_list(config)
    targets = {site.target for site in sites.attentions}
    expected = {site.name for site in sites.attentions if layers is None or site.layer in layers}
    config.target_modules = targets  # type: ignore[assignment]
    hits = {key for key, _ in model.named_modules() if key and check_target_module_exists(config, key)}
    if hits == expected or (config.exclude_modules is not None and hits < expected):
        return
    stacks = "|".join(re.escape(stack) for stack in sorted({site.stack for site in sites.attentions}))
    index = r"\d+" if layers is None else "|".join(map(str, layers))
    config.target_modules = rf"({stacks})\.({index})\.({'|'.join(re.escape(target) for target in sorted(targets))})"
    config.layers_to_transform = config.layers_pattern = None


def resolve_modules_to_save(model: nn.Module, keys: list[str], config: PreskipConfig) -> None:
    """Refuse names that match nothing, and lengthen those that the branch's own parts have, too.

    PEFT goes by the end of a key, and would take the branch's `preskip.gate` for a router called `gate`.
    """
    wanted = config.modules_to_save
    if not wanted:
        return
    if not any(key.rpartition(".")[2] in wanted or key.endswith(tuple(wanted)) for key in keys):
        heads = ""
        if config.task_type in HEAD_TASKS:
            own = [name for name, _ in model.named_children()][-1:]
            heads = f" (PEFT's names for this task's head): name this model's own head, e.g. modules_to_save={own}"
        raise PreskipError(f"modules_to_save={list(wanted)} match nothing in {type(model).__name__}{heads}")
    for name in set(wanted) & {*PARTS, "dropout"}:
        longer = {".".join(key.split(".")[-2:]) for key in keys if key.endswith(name)}
        wanted = [other for other in wanted if other != name] + sorted(longer)
    config.modules_to_save = wanted


def check_is_attention(key: str, module: Any) -> None:
    """Refuse a target that by its name, class and children is no attention."""
    inner = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    children = dict(module.named_children())
    mend = "target the module that holds the q/k/v projections, e.g. self_attn"
    if {"self", "output"} <= children.keys():
        raise PreskipError(f"{key} holds its attention and the sum behind it: target {key.rpartition('.')[2]}.self")
    is_linear = hasattr(inner, "in_features") or isinstance(inner, (nn.Embedding, nn.ModuleList, nn.ModuleDict))
    is_named_so = key.endswith(ATTENTION_NAMES) or type(inner).__name__.endswith(("Attention", "Attn"))
    holds_projections = any(name in INPUT_PROJECTIONS for name in children)
    if is_linear or not children or not (is_named_so or holds_projections):
        raise PreskipError(f"{key} ({type(inner).__name__}) is not an attention module: {mend}")


def listed_attentions(model: nn.Module) -> str:
    """The end of a message that says what the model's attentions are called; empty where none is known."""
    try:
        sites = find_sites(model)
    except PreskipError:
        return ""
    return f"; its attentions are called {', '.join(sorted({site.target for site in sites.attentions}))}"
