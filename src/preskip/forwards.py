"""The passes of modules for a while: another `forward`, in evaluation mode, or how often each runs."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another `forward` while the context lasts."""
    own = module.__dict__.get("forward")  # accelerate's hooks put one there
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while the context lasts; each module is put back to its own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def forwards_counted(modules: Iterable[nn.Module]) -> Iterator[Counter[nn.Module]]:
    """How often each of some modules runs while the context lasts.

    A layer that runs several times in a pass of its decoder reads what later layers gave.
    """
    calls = Counter[nn.Module]()
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(lambda own, *_: calls.update([own])).remove)
        yield calls


@contextmanager
def forward_autocast(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Compute a module's forward passes in another dtype than its weights', by autocast, while the context lasts."""
    # A copy of the module gets a copy of this partial, on the copy's own forward; a closure would keep this module's.
    forward = functools.partial(_autocast, module, module.forward, dtype)
    functools.update_wrapper(forward, module.forward)  # Trainer reads the names of the arguments
    with forward_replaced(module, forward):
        yield


def _autocast(module: nn.Module, plain: Callable[..., Any], dtype: torch.dtype, /, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(next(module.parameters()).device.type, dtype):
        return plain(*args, **kwargs)
