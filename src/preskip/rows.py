"""A batch whose rows use different branches: the base computes all rows at once, each branch those of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from preskip.errors import PreskipError

# PEFT's name for a row that no adapter changes.
BASE = "__base__"
# Inputs that have one entry per row; the others only where there is no text, which may have several pictures a row.
_TEXT = ("input_ids", "inputs", "inputs_embeds")
_OTHER = ("pixel_values", "input_features", "input_values")


def by_row(
    x: torch.Tensor, names: Sequence[str], run: Callable[[str, torch.Tensor], torch.Tensor | None], rest: torch.Tensor
) -> torch.Tensor:
    """Run each name's branch on the rows of that name.

    Args:
        x: the batch, [B, T, d].
        names: one per row, or one per group of consecutive rows of equal size (beams, several answers to a prompt).
        run: name and rows [b, T, d] → [b, T, d], or None where that branch gives nothing.
        rest: what rows keep whose branch gives nothing, [B, T, d].

    Returns:
        [B, T, d].

    Raises:
        PreskipError: the batch cannot be divided among the names.
    """
    if x.shape[0] % len(names):
        raise _misfit(names, x)
    each = x.shape[0] // len(names)
    for name in dict.fromkeys(names):
        if name == BASE:
            continue
        places = [row * each + copy for row, own in enumerate(names) if own == name for copy in range(each)]
        rows = torch.tensor(places, device=x.device)
        part = run(name, x.index_select(0, rows))
        if part is not None:
            rest = rest.index_copy(0, rows, part.to(rest.dtype))
    return rest


def check_names(names: Sequence[str], known: Collection[str]) -> list[str]:
    """The names of a batch's rows, checked.

    Raises:
        PreskipError: no name, or one that is not known.
    """
    unknown = [name for name in names if name not in known and name != BASE]
    if unknown or not names or isinstance(names, str):
        raise PreskipError(
            f"adapter_names={names!r} is not possible: give one name per row, out of {', '.join([*known, BASE])}"
        )
    return list(names)


def check_rows(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse names that are neither one per row of a caller's inputs nor one for all.

    Only `generate` may have several rows per name, and makes these itself (`by_row`).

    Args:
        names: the checked names.
        args: what a model's forward or `generate` is called with.
        kwargs: the same, by name.

    Raises:
        PreskipError: another number of names.
    """
    named = [kwargs[key] for key in _TEXT if kwargs.get(key) is not None]
    others = [kwargs[key] for key in _OTHER if kwargs.get(key) is not None]
    for inputs in [*args[:1], *named] or others:
        if isinstance(inputs, torch.Tensor) and len(names) not in (1, inputs.shape[0]):
            raise _misfit(names, inputs)


def _misfit(names: Sequence[str], batch: torch.Tensor) -> PreskipError:
    return PreskipError(
        f"{len(names)} adapter names do not fit a batch of {batch.shape[0]} rows: give one name per row of the input, "
        "or one for all"
    )


def check_free(names: Sequence[str] | None) -> None:
    """Refuse a model that another call, of another thread, has given names to: they lie in its modules.

    Raises:
        PreskipError: it has some.
    """
    if names is not None:
        raise PreskipError(
            "another call with adapter_names has not ended: of several threads let one at a time call it"
        )
