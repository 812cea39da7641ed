"""Strict checks of an adapter's tensors: what is missing, too many, of the wrong shape or not finite is named."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from preskip.adapter.layer import PreskipLayer
from preskip.attach import CHILD
from preskip.errors import PreskipError, some


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
    if missing:
        raise PreskipError(missing_tensors(missing))
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


def missing_tensors(keys: Collection[str]) -> str:
    """What to say of a checkpoint that lacks these tensors, one at least."""
    return f"the checkpoint lacks {some(sorted(keys), 1)}: it belongs to another model or is incomplete"


def expected_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Size]:
    """The shape of every tensor of one adapter, by the model's key."""
    expected = {}
    for path, module in model.named_modules():
        if isinstance(module, PreskipLayer):
            for part, linear in module.linears(adapter_name).items() if adapter_name in module.settings else ():
                expected[".".join(filter(None, (path, part, adapter_name, "weight")))] = linear.weight.shape
    return expected


def _check_shapes(tuner: nn.Module, found: dict[str, torch.Tensor]) -> None:
    """Name a tensor beside the branches that has another shape than the model's; torch would list them all."""
    tensors = dict(tuner.named_parameters(remove_duplicate=False))
    for key, tensor in found.items():
        if key in tensors and tensors[key].shape != tensor.shape and not hasattr(tensors[key], "quant_state"):
            sizes = f"{tuple(tensor.shape)} in the checkpoint, this model has {tuple(tensors[key].shape)}"
            rows = tensor.shape[0] if tensor.shape[1:] == tensors[key].shape[1:] else None
            mend = f": call resize_token_embeddings({rows}) on the base first" if rows and tensor.ndim == 2 else ""
            raise PreskipError(f"{key} has shape {sizes}{mend}")


def check_loaded(tuner: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """Load-state-dict pre-hook: an adapter that occurs in a checkpoint must occur whole, finite and in shape."""
    own = {key.removeprefix(prefix): value for key, value in state_dict.items() if f".{CHILD}." in key}
    names = {name for module in tuner.modules() if isinstance(module, PreskipLayer) for name in module.settings}
    known: dict[str, torch.Size] = {}
    for name in names:
        expected = expected_tensors(tuner, name)
        known.update(expected)
        if any(f".{name}.weight" in key for key in own):
            check_tensors({key: own[key] for key in own if f".{name}." in key}, expected, allow_extra=True)
    extra = sorted(own.keys() - known.keys())
    if own:
        others = {key.removeprefix(prefix): value for key, value in state_dict.items() if f".{CHILD}." not in key}
        _check_shapes(tuner, others)
        extra += _stray_base_tensors(tuner, set(others))
    if extra:
        raise PreskipError(f"the checkpoint holds a tensor that this adapter has no place for: {extra[0]}")
    # Of a module that holds the PEFT model, a part may be loaded that has nothing for this one.
    if not state_dict and names and prefix in ("", "base_model."):
        raise PreskipError("the checkpoint holds no tensor that belongs into this model")


def _stray_base_tensors(tuner: nn.Module, found: set[str]) -> list[str]:
    """Tensors of the base model in an adapter's checkpoint, which would overwrite the base; [] for a whole model's.

    A checkpoint with more than half of the base's tensors is a whole model's, which `strict=False` takes with gaps.
    What is trained, other adapters' weights and resized embeddings have their place beside a branch.
    """
    tensors = dict(tuner.named_parameters(remove_duplicate=False))
    # Tied tensors are one under several names, of which a file holds one at least.
    held = {id(tensors[key]) for key in found & tensors.keys()}
    base = {id(tensor) for key, tensor in tensors.items() if f".{CHILD}." not in key}
    if 2 * len(base & held) > len(base):
        return []
    embeddings = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # models of two towers have none of their own
            embeddings.append(getattr(tuner, name)())
    holders = [module for module in tuner.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    adapters = [attrgetter(name)(holder) for holder in holders for name in holder.adapter_layer_names]
    parts = [part for part in (*embeddings, *adapters) if isinstance(part, nn.Module)]
    allowed = {id(parameter) for part in parts for parameter in part.parameters()}
    strays = (key for key in found & tensors.keys() if id(tensors[key]) not in allowed)
    return sorted(key for key in strays if not tensors[key].requires_grad)
