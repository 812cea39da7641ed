"""A hook on a child of a module that stays with the child's name when another module takes its place.

An adapter of PEFT puts a layer of its own in the place of a linear one, which it calls within; merged, the linear one
is back. What a peer changes is what the model computes there, the adapter's part included, so its hook follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from preskip.attach import forget_compiled


class ChildHook:
    """A forward hook, or forward pre-hook, of `parent.name`.

    Args:
        parent: the module.
        name: of its child.
        hook: as torch calls it.
        before: whether it is a pre-hook.
    """

    def __init__(self, parent: nn.Module, name: str, hook: Callable[..., Any], *, before: bool = False) -> None:
        self.parent, self.name, self.hook, self.before = parent, name, hook, before
        self._register()

    def _register(self) -> None:
        self._child = getattr(self.parent, self.name)
        register = self._child.register_forward_pre_hook if self.before else self._child.register_forward_hook
        self._handle = register(self.hook)

    @property
    def id(self) -> int:
        """Key of the hook among those of the child."""
        return self._handle.id

    @property
    def is_behind(self) -> bool:
        """Whether the child is another module than the one with the hook."""
        return getattr(self.parent, self.name) is not self._child

    def follow(self) -> None:
        """Take the hook from the module that had it, and put it on the one that is there now."""
        self.remove()
        self._register()

    def remove(self) -> None:
        """Take the hook away."""
        self._handle.remove()


@torch.compiler.disable
def follow(hooks: list[ChildHook]) -> None:
    """Move the hooks that are left behind, in their order; and compile compiled models anew."""
    for hook in hooks:
        if hook.is_behind:
            hook.follow()
    forget_compiled()
