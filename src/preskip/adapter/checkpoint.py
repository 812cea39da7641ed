"""Strict checks of an adapter's tensors: what is missing, too many, of the wrong shape or not finite is named."""

from __future__ import annotations

from collections.abc import Mapping

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
    missing = sorted(expected.keys() - tensors.keys())
    if missing:
        layers = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PreskipError(f"the checkpoint lacks {missing[0]}{layers}: it belongs to another model or is incomplete")
    if not allow_extra:
        extra = sorted(key for key in tensors.keys() - expected.keys() if f".{CHILD}." in key)
        if extra:
            raise PreskipError(f"the checkpoint holds a tensor that this adapter has no place for: {extra[0]}")
    for key, shape in expected.items():
        if tensors[key].shape != shape:
            raise PreskipError(
                f"{key} has shape {tuple(tensors[key].shape)} in the checkpoint, this model needs {tuple(shape)}: the "
                "adapter was trained for another width or with other settings"
            )
    for key, value in tensors.items():
        if value.is_floating_point() and not value.is_meta and not torch.isfinite(value).all():
            raise PreskipError(f"{key} holds NaN or infinity: the checkpoint is damaged or its training diverged")
