"""Which of a model's own modules and parameters the floor arms train: norms, biases, IA3's factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from preskip.arms.arm import ArmContext
from preskip.arms.budget import block_of
from preskip.errors import PreskipError

if TYPE_CHECKING:
    from torch import nn


def norm_paths(context: ArmContext) -> list[str]:
    """Paths of the norms with weights in the adapted layers; with all layers adapted, also those outside of them.

    A norm is a module whose class is named so (LayerNorm, RMSNorm and their kin).

    Raises:
        PreskipError: there is none.
    """
    paths = [
        path
        for path, module in _decoder_modules(context)
        if "norm" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))
    ]
    if not paths:
        raise PreskipError(f"{type(context.base).__name__} has no norm with weights: leave the arm out")
    return paths


def bias_names(context: ArmContext) -> list[str]:
    """Names of the biases in the adapted layers; with all layers adapted, also those outside of them.

    Raises:
        PreskipError: there is none.
    """
    names = [
        f"{path}.{name}"
        for path, module in _decoder_modules(context)
        for name, _ in module.named_parameters(recurse=False)
        if name == "bias"
    ]
    if not names:
        raise PreskipError(
            f"arm bitfit: {type(context.base).__name__} has no biases to train, as models of Llama's kind: "
            "leave the arm out"
        )
    return names


def ia3_modules(context: ArmContext) -> tuple[list[str], list[str]]:
    """The modules IA3 rescales, and those of them that it rescales at their input, as PEFT chooses them by model type.

    Raises:
        PreskipError: PEFT has no choice for this model type.
    """
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
    )
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS,
    )

    from preskip.sites import text_decoder

    kind = str(text_decoder(context.base).config.model_type)  # type: ignore[union-attr]
    if kind not in TARGETS:
        raise PreskipError(f"PEFT names no modules for IA3 in {kind} models: leave the arm out")

    def ending_in(names: list[str]) -> list[str]:
        return [path for path, _ in _decoder_modules(context) if any(path.endswith(f".{name}") for name in names)]

    return ending_in(TARGETS[kind]), ending_in(FEEDFORWARD.get(kind, []))


def _decoder_modules(context: ArmContext) -> list[tuple[str, nn.Module]]:
    """Modules of the text decoder by path, only those of the adapted layers where the user chose some."""
    from preskip.sites import text_decoder

    decoder = text_decoder(context.base)
    prefix = next((path for path, module in context.base.named_modules() if module is decoder), "")
    modules = [(".".join(part for part in (prefix, path) if part), module) for path, module in decoder.named_modules()]
    if context.layers is None and not context.by_name:
        return modules
    blocks = tuple(block_of(path) + "." for path in context.targets)
    return [(path, module) for path, module in modules if f"{path}.".startswith(blocks)]
