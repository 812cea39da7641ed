"""Whether a branch may sit at an attention of a type that has no test here: found out on a small input, never assumed.

The method adds a skip to what the residual sum adds, and enriches all that attention reads. A module that holds its own
residual or norm (ALBERT, MPNet) gives something else, one that is handed the hidden states twice reads them past the
branch. Both look like any other attention from outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from preskip.attach import hidden_states_of
from preskip.errors import PreskipError

# The classes of attention on which the method's equation is tested (tests/adapter/test_families.py).
TESTED = {
    "BartAttention", "BertSelfAttention", "BloomAttention", "CohereAttention", "DeepseekV3Attention", "FalconAttention",
    "GPT2Attention", "GPTJAttention", "GPTNeoAttention", "GPTNeoXAttention", "Gemma2Attention", "Gemma3Attention",
    "Glm4Attention", "GptOssAttention", "LlamaAttention", "MistralAttention", "MixtralAttention", "ModernBertAttention",
    "OPTAttention", "Olmo2Attention", "Phi3Attention", "PhiAttention", "Qwen2Attention", "Qwen3Attention",
    "RobertaSelfAttention", "SmolLM3Attention", "StableLmAttention", "ViTAttention",
}  # fmt: skip
TOKENS = 4


class _Seen(Exception):
    """The attention has been called: the rest of the pass is not needed."""


def check_role(model: nn.Module, paths: Sequence[str]) -> None:
    """Refuse an attention whose output or input is not what the method needs; one of each untested class is tried.

    Args:
        model: the base; nothing of it is changed.
        paths: of the attention modules that would get a branch.

    Raises:
        PreskipError: the class and the reason: its output is not [B, T, d], holds a residual or a norm, or the hidden
            states reach it twice; or the model could not be run on a small input, so that nothing is known.
    """
    chosen: dict[str, str] = {}
    for path in paths:
        kind = type(model.get_submodule(path)).__name__
        if kind not in TESTED:
            chosen.setdefault(kind, path)
    for kind, path in chosen.items():
        if problem := _problem(model.get_submodule(path), *_call(model, kind, path)):
            raise PreskipError(f"{kind} at {path} cannot have a branch: {problem}; leave it out with exclude_modules")


def _call(model: nn.Module, kind: str, path: str) -> tuple[tuple, dict[str, Any]]:
    """Arguments with which a model calls one of its attention modules: the innermost model that can be run."""
    attention = model.get_submodule(path)
    calls: list[tuple[tuple, dict[str, Any]]] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise _Seen

    reason = "it was not reached"
    handle = attention.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
    try:
        for around in _models_around(model, path):
            try:
                with torch.no_grad(), _evaluating(around):
                    around(**small_input(around))
            except _Seen:
                return calls[0]
            except Exception as error:  # whatever a model raises on an input that is not for it
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    finally:
        handle.remove()
    raise PreskipError(
        f"{kind} at {path} has no test here, and could not be checked on a small input ({reason}): leave it out with "
        "exclude_modules"
    )


def _models_around(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The models that hold a module, the innermost first: a tower of a multimodal model reads other things than all."""
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if hasattr(module, "main_input_name"):
            yield module


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, each module put back to its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def small_input(model: Any) -> dict[str, torch.Tensor]:
    """A few tokens, a picture or a sound, as the model's config describes what it reads.

    Args:
        model: a transformers model.

    Raises:
        PreskipError: it has no config that tells.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise PreskipError(f"{type(model).__name__} has no config that tells what it reads")
    weight = next(weight for weight in model.parameters() if weight.is_floating_point())
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    ids = torch.arange(TOKENS, device=weight.device)[None] % getattr(text, "vocab_size", TOKENS)  # [1, T]
    main = getattr(model, "main_input_name", "input_ids")
    values: dict[str, torch.Tensor] = {}
    vision = getattr(config, "vision_config", config)
    if main == "input_ids" or hasattr(config, "text_config"):
        values["input_ids"] = ids
    if main == "pixel_values" or (main == "input_ids" and hasattr(config, "projection_dim")):
        size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
        shape = (1, getattr(vision, "num_channels", 3), size, size)
        values["pixel_values"] = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
    if main == "input_features":
        shape3 = (1, config.num_mel_bins, 2 * config.max_source_positions)
        values["input_features"] = torch.zeros(shape3, device=weight.device, dtype=weight.dtype)
    if main == "input_values":
        values["input_values"] = torch.zeros((1, 4000), device=weight.device, dtype=weight.dtype)
    if getattr(config, "is_encoder_decoder", False):
        values["decoder_input_ids"] = ids
    return values


def _problem(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """What is wrong with an attention, or None."""
    hidden_states = hidden_states_of(args, kwargs)
    rest = [*enumerate(args[1:], 2), *((name, value) for name, value in kwargs.items() if name != "hidden_states")]
    for name, value in rest:
        is_same = isinstance(value, torch.Tensor) and value.shape == hidden_states.shape
        if is_same and torch.equal(value, hidden_states):
            return f"it is given the hidden states once more, as its argument {name}, which a branch would not enrich"
    if hidden_states.is_meta:
        return "its weights are on the meta device, where nothing can be computed to check it"
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(_evaluating(attention))
        for module in attention.modules():
            if is_linear(module):
                stack.callback(module.register_forward_hook(_nothing).remove)
        output = attention(*args, **kwargs)
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, torch.Tensor) or first.shape != hidden_states.shape:
        found = tuple(first.shape) if isinstance(first, torch.Tensor) else type(first).__name__
        return f"its output is {found}, its input {tuple(hidden_states.shape)}"
    if first.abs().max() > 0:
        return (
            "its output is not 0 where all its projections give 0, so it holds a residual, a norm or projections that "
            "are no linear layers"
        )
    return None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix product: a linear layer of any kind, or GPT-2's Conv1D."""
    return (hasattr(module, "in_features") and hasattr(module, "out_features")) or type(module).__name__ == "Conv1D"


def _nothing(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output)
