"""Whether a branch may sit at an attention of a type that has no test here: found out on a small input, never assumed.

The method adds a skip to what the residual sum adds, and enriches all that attention reads. A module that holds its own
residual or norm (ALBERT, MPNet) gives something else, one that is handed the hidden states twice reads them past the
branch. Both look like any other attention from outside.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from preskip.attach import ELSEWHERE, hidden_states_of
from preskip.errors import PreskipError, one_line
from preskip.forwards import evaluating
from preskip.sites import find_sites

# The classes of attention on which the method's equation is tested (tests/adapter/test_families.py).
TESTED = {
    "BartAttention", "BertSelfAttention", "BloomAttention", "CLIPAttention", "CohereAttention",
    "DeepseekV3Attention", "DisentangledSelfAttention", "ElectraSelfAttention", "FalconAttention",
    "FalconH1Attention", "GPT2Attention", "GPTJAttention", "GPTNeoAttention", "GPTNeoXAttention",
    "Gemma2Attention", "Gemma3Attention", "Gemma3nTextAttention", "Gemma4TextAttention", "Glm4Attention",
    "GptOssAttention", "GraniteMoeHybridAttention", "JambaAttention", "Lfm2Attention", "LlamaAttention",
    "MiniMaxAttention", "MistralAttention", "MixtralAttention", "ModernBertAttention", "NemotronHAttention",
    "OPTAttention", "Olmo2Attention", "Phi3Attention", "PhiAttention", "Qwen2Attention", "Qwen3Attention",
    "Qwen3NextAttention", "RecurrentGemmaAttention", "RobertaSelfAttention", "SiglipAttention", "SmolLM3Attention",
    "StableLmAttention", "T5Attention", "UMT5Attention", "ViTAttention", "WhisperAttention",
}  # fmt: skip
TOKENS = 4


Call = tuple[tuple, dict[str, Any]]


class _Seen(Exception):
    """The attention has been called: the rest of the pass is not needed."""


def check_role(model: nn.Module, paths: Sequence[str]) -> None:
    """Refuse an attention whose output or input is not what the method needs; one of each untested class is tried.

    A tested class is tried, too, where it stands elsewhere than in a block's self-attention.

    Args:
        model: the base; nothing of it is changed.
        paths: of the attention modules that would get a branch.

    Raises:
        PreskipError: the class and the reason: its output is not [B, T, d], holds a residual or a norm, is no softmax
            over tokens, or it reads more of the tokens than the hidden states given once; or the model could not be
            run on a small input, so that nothing is known.
    """
    try:
        known = {site.name for site in find_sites(model).attentions}
    except PreskipError:
        known = set()
    chosen: dict[tuple[str, str, str], str] = {}  # by class and name of the attention, and the class of its block
    for path in paths:
        kind = type(model.get_submodule(path))
        is_tested = kind.__name__ in TESTED and kind.__module__.startswith("transformers.")
        if not (is_tested and path in known):
            block, _, last = path.rpartition(".")
            chosen.setdefault((kind.__name__, last, type(model.get_submodule(block)).__name__), path)
    for (name, *_), path in chosen.items():
        implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
        if problem := _problem(model.get_submodule(path), *_calls(model, name, path), implementation):
            raise PreskipError(
                f"{name} at {path} cannot have a branch: {problem}; leave it out with exclude_modules or "
                "layers_to_transform"
            )


def _calls(model: nn.Module, kind: str, path: str) -> tuple[Call, Call]:
    """How a model calls one of its attention modules on two inputs: the innermost model that can be run."""
    attention = model.get_submodule(path)
    calls: list[Call] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        raise _Seen

    reason = "it was not reached"
    handle = attention.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
    try:
        for around in _models_around(model, path):
            if getattr(around, "attention_type", None) == "block_sparse":  # and would, run here, for good
                raise PreskipError(
                    f"{kind} at {path} cannot have a branch: on a short text the model puts another attention in its "
                    'place; load the model with attention_type="original_full"'
                )
            calls.clear()
            try:
                for number in (0, 1):
                    with torch.no_grad(), evaluating(around), suppress(_Seen):
                        around(**small_input(around, number))
            except Exception as error:  # whatever a model raises on an input that is not for it
                reason = f"{type(error).__name__}: {one_line(error, 120)}"
            if len(calls) == 2:
                return calls[0], calls[1]
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


def small_input(model: Any, number: int = 0) -> dict[str, torch.Tensor]:
    """A few tokens, a picture or a sound, as the model's config describes what it reads.

    Args:
        model: a transformers model.
        number: 0 or 1, for one input or another.

    Raises:
        PreskipError: it has no config that tells.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise PreskipError(f"{type(model).__name__} has no config that tells what it reads")
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    # Weights that accelerate keeps on disk are on the meta device; what runs is where the others are.
    weight = next((weight for weight in weights if not weight.is_meta), weights[0])
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None) or weight.device
    floats = partial(torch.full, fill_value=float(number), device=device, dtype=weight.dtype)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = inspect.signature(model.forward).parameters
    ids = _plain_ids(text, number).to(device)  # [1, T]
    main = getattr(model, "main_input_name", "input_ids")
    values: dict[str, torch.Tensor] = {}
    vision = getattr(config, "vision_config", config)
    if main == "input_ids" or hasattr(config, "text_config"):
        values["input_ids"] = ids
    if main == "pixel_values" or (hasattr(config, "text_config") and hasattr(config, "projection_dim")):
        channels = getattr(vision, "num_channels", 3)
        if "spatial_shapes" in names:  # SigLIP 2 reads patches
            values["pixel_values"] = floats((1, TOKENS, channels * vision.patch_size**2))
            values["pixel_attention_mask"] = torch.ones((1, TOKENS), dtype=torch.long, device=device)
            values["spatial_shapes"] = torch.tensor([[2, TOKENS // 2]], device=device)
        else:
            size = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
            values["pixel_values"] = floats((1, channels, size, size))
    if main == "input_features":
        values["input_features"] = floats((1, config.num_mel_bins, 2 * config.max_source_positions))
    if main == "input_values":
        values["input_values"] = floats((1, 4000))
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        values["decoder_input_ids"] = ids
    return values


def _plain_ids(config: Any, number: int) -> torch.Tensor:
    """Token ids [1, T], of which a model knows nothing special where there are others."""
    vocabulary = getattr(config, "vocab_size", TOKENS)
    named = [value for key, value in vars(config).items() if key.endswith(("_token_id", "_token_index"))]
    special = {token for value in named for token in (value if isinstance(value, list) else [value])}
    plain = [token for token in range(min(vocabulary, 8 * TOKENS)) if token not in special] or [0]
    return torch.tensor([[plain[(number * TOKENS + index) % len(plain)] for index in range(TOKENS)]])


def _problem(attention: nn.Module, call: Call, other: Call, implementation: str | None) -> str | None:
    """What is wrong with an attention, or None; it was called in two ways, on two inputs of the model."""
    args, kwargs = call
    if any(kwargs.get(name) is not None for name in ELSEWHERE):
        return "it runs as cross-attention"
    if "entity_hidden_states" in inspect.signature(attention.forward).parameters:
        return "it reads entity_hidden_states, too, which a branch would not enrich"
    hidden_states = hidden_states_of(args, kwargs)
    others = dict(_tensors(*other))
    for name, value in _tensors(args, kwargs):
        if value.shape == hidden_states.shape and torch.equal(value, hidden_states):
            return f"it is given the hidden states once more, as its argument {name}, which a branch would not enrich"
        if name in others and value.shape == others[name].shape and not torch.equal(value, others[name]):
            return f"its argument {name} depends on the tokens, too, and a branch would not enrich it"
    if hidden_states.is_meta:
        return "its weights are on the meta device, where nothing can be computed to check it"
    functions = _Functions()
    with torch.no_grad(), functions, ExitStack() as stack:
        stack.enter_context(evaluating(attention))
        for module in attention.modules():
            if is_linear(module):
                stack.callback(module.register_forward_hook(_nothing).remove)
        outputs = [attention(*one, **more) for one, more in (call, other)]
    first, second = (output[0] if isinstance(output, tuple) else output for output in outputs)
    if not isinstance(first, torch.Tensor) or first.shape != hidden_states.shape:
        found = tuple(first.shape) if isinstance(first, torch.Tensor) else type(first).__name__
        return f"its output is {found}, its input {tuple(hidden_states.shape)}"
    if not torch.equal(first, second):  # equal: nothing, or biases
        return (
            "its output depends on its input also where all its projections give 0, so it holds a residual, a norm or "
            "projections that are no linear layers"
        )
    if implementation in ("eager", "sdpa") and not functions.softmax:  # kernels of their own cannot be seen
        return "it mixes tokens without a softmax, so it is another kind of layer"
    return None


def _tensors(args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The numbers that a call gives beside the hidden states, by name or place."""
    named = {**{str(place): value for place, value in enumerate(args[1:], 2)}, **kwargs}
    for name, value in named.items():
        if name != "hidden_states" and isinstance(value, torch.Tensor) and value.is_floating_point():
            yield name, value


class _Functions(TorchFunctionMode):
    """Looks whether a softmax is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = getattr(func, "__name__", "")
        self.softmax = self.softmax or "softmax" in name or name == "scaled_dot_product_attention"
        return func(*args, **(kwargs or {}))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a matrix product: a linear layer of any kind, or GPT-2's Conv1D."""
    return (hasattr(module, "in_features") and hasattr(module, "out_features")) or type(module).__name__ == "Conv1D"


def _nothing(module: nn.Module, args: tuple, output: Any) -> Any:
    return torch.zeros_like(output) if isinstance(output, torch.Tensor) else output
