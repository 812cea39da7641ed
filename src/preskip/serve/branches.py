"""Branches and hooks of a model whose modules an engine has replaced: put back, counted, and missed aloud."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from preskip.attach import CHILD, attach, detach, tap_of
from preskip.errors import PreskipError
from preskip.serve.by_token import ByToken
from preskip.sites import find_sites


def put_back(
    model: nn.Module,
    config: Any,
    plain: Callable[[Any, str], nn.Module] | None = None,
    pick: Callable[[str], nn.Module] | None = None,
    *,
    is_whole: bool = True,
) -> None:
    """Register every branch's hooks anew, on the modules that are there now.

    Args:
        model: built from a `preskip_<type>` config; its norms and linear layers may be replaced since.
        config: of the model.
        plain: makes, of a layer of a branch and its path, the layer to put in its place.
        pick: makes, of the path of several adapters' branches, the layer that tells the tokens' adapters (`ByToken`).
        is_whole: False where this process has some of the layers only (pipeline parallelism).

    Raises:
        PreskipError: a layer that should have a branch has none, or there are several adapters and no `pick`.
    """
    if config.preskip_adapters and pick is None:
        raise PreskipError(
            f"the checkpoint holds {len(config.preskip_adapters)} adapters, which vLLM picks by its LoRA requests: "
            "start it with `preskip serve`"
        )
    for attention, branch, tap, path in _branches(model, config, is_whole):
        own = {f"{path}.{name}": branch[name] for name in branch} if config.preskip_adapters else {path: branch}
        for place, one in own.items() if plain is not None else ():
            for part, linear in one.linears.items():
                setattr(one, part, plain(linear, f"{place}.{part}"))  # type: ignore[misc]
        detach(attention)
        attach(attention, ByToken(branch, pick(path)) if config.preskip_adapters and pick else branch, tap)


def with_scales(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors by name, a branch's int8 matrices multiplied by their scales.

    Raises:
        PreskipError: a matrix without its scales, or the reverse.
    """
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in weights:
        path, _, leaf = name.rpartition(".")
        if f".{CHILD}." in name and (leaf == "scale" or tensor.dtype == torch.int8):
            both = halves.setdefault(path, {})
            both[leaf] = tensor
            if len(both) == 2:
                del halves[path]
                yield f"{path}.weight", both["weight"].float() * both["scale"].float()[:, None]
        else:
            yield name, tensor
    if halves:
        raise PreskipError(f"{next(iter(halves))} lacks its int8 weights or their scales: bake the checkpoint again")


def check_hooks(model: nn.Module, config: Any, *, is_whole: bool = True) -> int:
    """Count the branches whose hooks are all on modules that the model calls.

    Args:
        model: see `put_back`.
        config: of the model.
        is_whole: see `put_back`.

    Returns:
        How many there are: all that should be.

    Raises:
        PreskipError: a branch or one of its hooks is missing.
    """
    count = 0
    for attention, branch, tap, path in _branches(model, config, is_whole):
        expected = [attention._forward_pre_hooks, attention._forward_hooks]
        if tap is not None:
            expected.append(tap._forward_hooks)
        found = [_hooks_with(handle) for handle in branch.hook_handles]
        if len(found) != len(expected) or any(a is not b for a, b in zip(found, expected, strict=True)):
            raise PreskipError(
                f"a hook of {path} is lost: the engine has replaced a module around it, and would answer as if the "
                "branch were another"
            )
        count += 1
    return count


def _hooks_with(handle: Any) -> Any:
    """The hooks of a module that this one is among; None where it is no more."""
    hooks = handle.hooks_dict_ref()
    return hooks if hooks is not None and handle.id in hooks else None


def _branches(model: nn.Module, config: Any, is_whole: bool) -> Iterator[tuple[Any, Any, nn.Module | None, str]]:
    """Each attention that should have a branch: itself, the branch, the tap, and the branch's path."""
    chosen = set(range(config.num_hidden_layers) if config.preskip_layers is None else config.preskip_layers)
    sites = [site for site in find_sites(model).attentions if site.layer in chosen]
    have = [site for site in sites if isinstance(getattr(model.get_submodule(site.name), CHILD, None), nn.Module)]
    expected = len(chosen) if is_whole else len(sites)
    if len(have) != expected:
        raise PreskipError(
            f"{len(have)} of {expected} branches are in the model that would be served, which would answer wrongly: "
            "see `preskip doctor` for versions that are tested"
        )
    for site in have:
        attention: Any = model.get_submodule(site.name)
        tap = tap_of(model, site.name, config.preskip_skip_position)
        yield attention, getattr(attention, CHILD), tap, f"{site.name}.{CHILD}"
