"""Put peers into a model's blocks, and take them out; save them and load them again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from preskip.errors import PreskipError, one_line
from preskip.peers.names import PEERS
from preskip.peers.place import PeerModule, Place
from preskip.peers.tokens import Tokens
from preskip.runs.files import read_json, write_json
from preskip.sites import find_sites, site_of, text_decoder

# The child of a block that holds what peers add to it.
CHILD = "peers"
SETTINGS, WEIGHTS = "peers.json", "peers.safetensors"


def attach_peers(
    model: nn.Module,
    peers: Mapping[str, Mapping[str, Any]],
    *,
    targets: Sequence[str] | None = None,
    identity: bool = False,
) -> None:
    """Put peers into the blocks of a model.

    Args:
        model: changed in place.
        peers: settings by name (`preskip.peers.names.PEERS`), {} for none.
        targets: paths of the attentions whose blocks get them; None for every self-attention of the text decoder.
        identity: the model stays exactly as it is until the peers are trained, and their weights are float32, on the
            device of the block. Otherwise they start as in their papers, in torch's default dtype.

    Raises:
        PreskipError: an unknown peer, one that does not fit the model, or a model that has peers already.
    """
    check_peers(peers)
    if any(isinstance(module, PeerModule) for module in model.modules()):
        raise PreskipError(f"{type(model).__name__} has peers in its blocks already: take the plain model")
    if targets is None:
        sites = list(find_sites(model).attentions)
    else:
        sites = [site_of(model, target) for target in targets]
    decoder: Any = text_decoder(model)
    tokens = Tokens(decoder.config)
    tokens.watch(decoder)
    decoder.peer_tokens = tokens
    chosen = tuple(sorted({site.layer for site in sites}))
    try:
        for site in sites:
            block = model.get_submodule(f"{site.stack}.{site.layer}")
            attention = model.get_submodule(site.name)
            place = Place(
                config=decoder.config,
                block=block,
                attention=attention,
                layer=site.layer,
                chosen=chosen,
                tokens=tokens,
                identity=identity,
            )
            held = nn.ModuleDict()
            block.add_module(CHILD, held)
            for name, settings in peers.items():
                held[name.replace("-", "_")] = nn.ModuleDict(PEERS[name](place, **settings))
            if identity:
                held.to(device=next(attention.parameters()).device, dtype=torch.float32)
    except PreskipError:
        detach_peers(model)
        raise


def detach_peers(model: nn.Module) -> None:
    """Take all peers out; the model is then as before `attach_peers`."""
    for module in list(model.modules()):
        if isinstance(module, PeerModule):
            for handle in module.handles:
                handle.remove()
        tokens = module.__dict__.pop("peer_tokens", None)
        for handle in () if tokens is None else tokens.handles:
            handle.remove()
    for module in list(model.modules()):
        if isinstance(module._modules.get(CHILD), nn.ModuleDict):
            delattr(module, CHILD)


@contextmanager
def peers_off(model: nn.Module) -> Iterator[None]:
    """While the context lasts, the model computes as without its peers; their hooks keep their order."""
    modules = list(model.modules())
    handles = [handle for module in modules if isinstance(module, PeerModule) for handle in module.handles]
    handles += [handle for module in modules for handle in getattr(module.__dict__.get("peer_tokens"), "handles", ())]
    off = {handle.id for handle in handles}
    hooks = [held for module in modules for held in (module._forward_pre_hooks, module._forward_hooks) if off & {*held}]
    before = [dict(held) for held in hooks]
    try:
        for held in hooks:
            for number in off & {*held}:
                del held[number]
        yield
    finally:
        for held, all_of_them in zip(hooks, before, strict=True):
            held.clear()
            held.update(all_of_them)


def peer_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all peers in a model, by name."""
    return {name: weight for name, weight in model.named_parameters() if f".{CHILD}." in f".{name}"}


def check_peers(peers: Mapping[str, Any]) -> None:
    """Refuse unknown names.

    Raises:
        PreskipError: the name, and those that there are.
    """
    unknown = [name for name in peers if name not in PEERS]
    if unknown:
        raise PreskipError(f"there is no peer {unknown[0]!r}: choose from {', '.join(PEERS)}")


def save_peers(
    model: nn.Module, folder: Path, peers: Mapping[str, Mapping[str, Any]], targets: Sequence[str] | None = None
) -> None:
    """Write the peers of a frozen model: settings and weights; the arguments are those of `attach_peers`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.detach().contiguous() for name, weight in peer_weights(model).items()}, folder / WEIGHTS)
    write_json(folder / SETTINGS, {"peers": peers, "targets": None if targets is None else list(targets)})


def load_peers(model: nn.Module, folder: Path) -> None:
    """Put the saved peers of a folder into the model that they were trained on.

    Raises:
        PreskipError: a file is missing or damaged, or does not fit this model in every tensor.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    saved: Any = read_json(folder / SETTINGS)
    try:
        weights = load_file(folder / WEIGHTS)
        attach_peers(model, saved["peers"], targets=saved["targets"], identity=True)
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
        raise PreskipError(f"{folder} does not fit this model: {one_line(error, 200)}") from error
    own = peer_weights(model)
    odd = sorted(own.keys() ^ weights.keys()) or [name for name in own if own[name].shape != weights[name].shape]
    if odd:
        detach_peers(model)
        raise PreskipError(f"{folder} does not fit this model: {odd[0]} is missing or of another size")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])
