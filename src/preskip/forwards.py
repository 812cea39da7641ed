"""Another `forward` of a module for a while."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
def forward_autocast(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Compute a module's forward passes in another dtype than its weights', by autocast, while the context lasts."""
    plain = module.forward

    @functools.wraps(plain)  # Trainer reads the names of the arguments
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(next(module.parameters()).device.type, dtype):
            return plain(*args, **kwargs)

    with forward_replaced(module, forward):
        yield
