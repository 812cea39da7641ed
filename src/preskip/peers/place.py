"""Where a peer is put, and what its modules have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from preskip.peers.child_hook import ChildHook
from preskip.peers.tokens import Tokens


class PeerModule(nn.Module):
    """A module that a peer adds to a block: it initialises its own weights, and knows its hooks.

    Attributes:
        handles: of the hooks, removed by `preskip.peers.detach_peers`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[Any] = []

    def hook_child(
        self, tokens: Tokens, parent: nn.Module, name: str, hook: Callable[..., Any], *, before: bool = False
    ) -> None:
        """Register a forward hook on a child of a module, behind an adapter's layer that takes its place.

        Args:
            tokens: looks in front of each pass whether the child is the one with the hook.
            parent: the module.
            name: of its child.
            hook: as torch calls it.
            before: whether it is a pre-hook.
        """
        made = ChildHook(parent, name, hook, before=before)
        self.handles.append(made)
        tokens.child_hooks.append(made)

    def reset_parameters(self) -> None:
        """Initialise all weights, those of children too, with functions of `torch.nn.init`.

        transformers asks for it when it makes a model, and lets those functions skip weights that were loaded.
        """
        raise NotImplementedError

    @property
    def flops_per_token(self) -> int:
        """Forward FLOPs that it adds: 2 per weight of its own matrices, 1 per multiplication with a factor beside."""
        return sum(2 * weight.numel() for weight in self.parameters(recurse=False) if weight.ndim > 1)


@dataclass(frozen=True, kw_only=True)
class Place:
    """One block that a peer is put into.

    Attributes:
        config: of the text decoder.
        block: holds attention and MLP.
        attention: its self-attention.
        layer: index of the block.
        chosen: layer indices that the peer is put into, ascending.
        tokens: what is known of the tokens of a forward pass.
        identity: whether the model must at first be exactly as it was (frozen), in place of the paper's start.
    """

    config: Any
    block: nn.Module
    attention: nn.Module
    layer: int
    chosen: tuple[int, ...]
    tokens: Tokens
    identity: bool
