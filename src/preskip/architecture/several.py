"""The branches of several adapters side by side in one model; each row of a batch picks one by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from preskip.branch import BranchSettings, PreskipBranch
from preskip.errors import PreskipError
from preskip.rows import by_row, check_free, check_names, check_rows


class SeveralBranches(nn.ModuleDict):
    """One branch per adapter at one attention, by the adapter's name.

    Args:
        width: d of the attention's input.
        settings: by name; where no row has picked, all rows have the first.
    """

    def __init__(self, width: int, settings: Mapping[str, BranchSettings]) -> None:
        super().__init__({name: PreskipBranch(width, own) for name, own in settings.items()})
        self.row_names: list[str] | None = None

    def _names(self) -> list[str]:
        return self.row_names or [next(iter(self))]

    def enrich(self, x: torch.Tensor) -> torch.Tensor:
        """What attention reads, [B, T, d]."""
        return by_row(x, self._names(), lambda name, rows: self[name].enrich(rows), x)  # type: ignore[operator]

    def content(self, attention_input: torch.Tensor) -> torch.Tensor:
        """What goes around attention, [B, T, d]; 0 in rows whose branch adds nothing."""
        return by_row(
            attention_input,
            self._names(),
            lambda name, rows: self[name].content(rows),  # type: ignore[operator]
            torch.zeros_like(attention_input),
        )


class PicksByName:
    """Calls and `generate` of a causal model with several adapters take `adapter_names`, one per row or one for all."""

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """As the model's `forward`."""
        if adapter_names is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with picked(self, adapter_names):  # type: ignore[arg-type]
            check_rows(adapter_names, args, kwargs)
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """As transformers' `generate`; `adapter_names` has one name per prompt, or one for all."""
        if adapter_names is None:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        with picked(self, adapter_names):  # type: ignore[arg-type]
            check_rows(adapter_names, args, kwargs)
            return super().generate(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def picked(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Give the rows of all batches in this block the branches of these adapters.

    Args:
        model: with several adapters.
        names: one per row of a batch, or per group of consecutive rows. They lie in the model until the block ends, so
            of several threads one at a time may call it: give each a model of its own, or a lock.

    Raises:
        PreskipError: a name that the model has not, a model with one adapter alone, one that trains, or one that
            another call has given names to.
    """
    if model.training:  # gradient checkpointing computes again in the backward pass, when no row has a name any more
        raise PreskipError("adapter_names is for inference: call model.eval() first")
    branches = [module for module in model.modules() if isinstance(module, SeveralBranches)]
    if not branches:
        raise PreskipError(f"{type(model).__name__} has one adapter alone: adapter_names needs several, baked together")
    checked = check_names(names, list(branches[0]))
    check_free(branches[0].row_names)
    try:
        for branch in branches:
            branch.row_names = checked
        yield
    finally:
        for branch in branches:
            branch.row_names = None
