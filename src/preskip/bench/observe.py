"""What a piece of work does, counted and not timed: operations, and the peak of the memory that tensors hold."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from preskip.optimizing import copies


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What `observe` counts.

    Attributes:
        operations: calls of ATen operations that compute something.
        bytes: peak of the memory held by tensors made meanwhile, and by the copies of the branches' weights.
    """

    operations: int
    bytes: int


def observe(run: Callable[[], Any], model: nn.Module, device: torch.device) -> Observed:
    """Run something once and count.

    The copies that the model keeps of its branches' weights (`preskip.optimizing.copies`) are there before, and count.
    On CUDA the memory is the allocator's own peak, elsewhere that of all live tensors: what a kernel holds for itself
    is then not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    live = _Live(model)
    copied = live.held
    with live:
        run()
    peak = live.peak
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before + copied
    return Observed(operations=live.operations, bytes=peak)


class _Live(TorchDispatchMode):
    """Follows the storages that operations make until they are freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.operations = self.held = self.peak = 0
        tensors = (*model.parameters(), *model.buffers())
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors if not tensor.is_meta}
        for tensor in copies(model):  # followed, since training frees them for new ones
            if tensor.is_mkldnn:
                self.held += tensor.numel() * tensor.element_size()
            else:
                self._follow(tensor.untyped_storage())
        self.peak = self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in self._tensors((args, kwargs))}
        self._known |= given  # made before: inputs, caches
        out = func(*args, **(kwargs or {}))
        made = self._tensors(out)
        # Another view of the same numbers is none.
        is_view = made and all(tensor.untyped_storage()._cdata in given for tensor in made)
        self.operations += func._schema.is_mutable or not is_view
        for tensor in made:
            self._follow(tensor.untyped_storage())
        return out

    @staticmethod
    def _tensors(tree: Any) -> list[torch.Tensor]:
        leaves = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
        return [leaf for leaf in leaves if not leaf.is_mkldnn]  # packed weights have no storage to look at

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size
