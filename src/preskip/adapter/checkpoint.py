"""Strict checks of an adapter's tensors: what is missing, too many, of the wrong shape or not finite is named."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch

from preskip.attach import CHILD
from preskip.errors import PreskipError


def check_tensors(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size], *, allow_extra: bool
) -> None:
    """Compare the tensors of a checkpoint with what an adapter needs.

    Args:
        tensors: the checkpoint's tensors, by the model's key.
        expected: the shape of every tensor of the adapter, by the model's key.
        allow_extra: whether tensors outside the branches may be present (the classes of `modules_to_save`).

    Raises:
        PreskipError: naming the first missing, extra, wrong-shape or non-finite tensor.
    """
    extra = () if allow_extra else [key for key in tensors.keys() - expected.keys() if f".{CHILD}." in key]
    found = {key: tensors[key].shape for key in expected if key in tensors}
    refuse(
        missing=expected.keys() - tensors.keys(),
        extra=extra,
        mismatched=[(key, shape, expected[key]) for key, shape in found.items() if shape != expected[key]],
        tensors=tensors,
    )


def refuse(
    *,
    missing: Collection[str],
    extra: Iterable[str],
    mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Name the first tensor that is amiss; nothing where all is well.

    Args:
        missing: keys that the checkpoint lacks.
        extra: keys that the adapter has no place for.
        mismatched: keys with the shape in the checkpoint and the shape that is needed.
        tensors: those to look through for what is not finite.

    Raises:
        PreskipError: see above.
    """
    for key in sorted(missing)[:1]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PreskipError(f"the checkpoint lacks {key}{more}: it belongs to another model or is incomplete")
    for key in sorted(extra):
        raise PreskipError(f"the checkpoint holds a tensor that this adapter has no place for: {key}")
    for key, found, needed in mismatched:
        raise PreskipError(
            f"{key} has shape {tuple(found)} in the checkpoint, this model needs {tuple(needed)}: the adapter was "
            "trained for another width or with other settings"
        )
    for key, value in tensors.items():
        if value.is_floating_point() and not value.is_meta and not torch.isfinite(value).all():
            raise PreskipError(f"{key} holds NaN or infinity: the checkpoint is damaged or its training diverged")
