"""How a branch is hooked into an attention, for every model family. Knows no PEFT.

The branch is a child `preskip` of the attention module. A forward pre-hook replaces the attention's `hidden_states` by
x̃; a forward hook adds W_skip · x̃ to its output. The forward hook sees the arguments as the pre-hook left them, so
nothing is stored between the two: the pair is stateless, compiles, checkpoints and shards.

Two kinds of block need a third hook (a tap), because the attention module's own output is not yet what the residual
sum adds: BERT's, whose output projection is a sibling of `attention.self`, and, on request, blocks with a norm behind
attention (`skip_position="residual"`). In BERT's the skip joins what the dropout behind the projection reads: another
adapter may wrap and scale the projection, but not the dropout.
"""

from __future__ import annotations

import sys
import weakref
from threading import get_ident
from typing import Any

import torch
from torch import nn

from preskip.branch_settings import SKIP_POSITIONS
from preskip.errors import PreskipError

CHILD = "preskip"

# Blocks that norm the attention's output before the residual sum. Keyed by class, because the name alone lies:
# `post_attention_layernorm` is this norm in Gemma, and the norm before the MLP in Llama.
POST_ATTENTION_NORMS = {
    "AfmoeDecoderLayer": "post_attention_layernorm",
    "DiffusionGemmaDecoderTextLayer": "post_attention_layernorm",
    "DiffusionGemmaEncoderTextLayer": "post_attention_layernorm",
    "DoryDecoderLayer": "post_attention_layernorm",
    "EmbeddingGemma2EncoderLayer": "post_attention_layernorm",
    "Exaone4_5_DecoderLayer": "post_attention_layernorm",
    "Exaone4DecoderLayer": "post_attention_layernorm",
    "FlexOlmoDecoderLayer": "post_attention_layernorm",
    "Gemma2DecoderLayer": "post_attention_layernorm",
    "Gemma3DecoderLayer": "post_attention_layernorm",
    "Gemma3nTextDecoderLayer": "post_attention_layernorm",
    "Gemma4TextDecoderLayer": "post_attention_layernorm",
    "Gemma4UnifiedTextDecoderLayer": "post_attention_layernorm",
    "Gemma4VisionEncoderLayer": "post_attention_layernorm",
    "Glm4DecoderLayer": "post_self_attn_layernorm",
    "Glm4vTextDecoderLayer": "post_self_attn_layernorm",
    "GlmImageTextDecoderLayer": "post_self_attn_layernorm",
    "GlmOcrTextDecoderLayer": "post_self_attn_layernorm",
    "HyperCLOVAXDecoderLayer": "post_norm1",
    "Kolibri1DecoderLayer": "post_self_attn_layernorm",
    "Lfm3DecoderLayer": "post_operator_norm",
    "MuseGlimmerTextDecoderLayer": "post_attention_layernorm",
    "Olmo2DecoderLayer": "post_attention_layernorm",
    "Olmo3DecoderLayer": "post_attention_layernorm",
    "OlmoHybridAttentionDecoderLayer": "post_attention_layernorm",
    "T5Gemma2DecoderLayer": "post_self_attn_layernorm",
    "T5Gemma2EncoderLayer": "post_self_attn_layernorm",
    "T5GemmaDecoderLayer": "post_self_attn_layernorm",
    "T5GemmaEncoderLayer": "post_self_attn_layernorm",
    "TimesFm2_5DecoderLayer": "post_attention_layernorm",
}

# Arguments of an attention that bring keys, values or queries from elsewhere (DeBERTa's decoding passes its queries).
ELSEWHERE = ("key_value_states", "encoder_hidden_states", "query_states")


def attach(attention: nn.Module, branch: nn.Module, tap: nn.Module | None = None) -> None:
    """Make `branch` a child of `attention` and register its hooks.

    Args:
        attention: a module whose forward takes `hidden_states` [B, T, d] first or by name, and returns a tensor
            [B, T, d] or a tuple that starts with it.
        branch: has `enrich(x̂) -> x̃` and `content(x̃) -> skip | None`, and accepts new attributes.
        tap: the module to whose output the skip is added, in place of the attention's own; to the input of a dropout.

    Where the model may be compiled already, call `forget_compiled` behind it.
    """
    attention.add_module(CHILD, branch)
    handles = [attention.register_forward_pre_hook(replace_input, with_kwargs=True)]
    if tap is None:
        handles.append(attention.register_forward_hook(add_skip, with_kwargs=True))
    else:
        carrier = _Tap(attention)
        handles.append(attention.register_forward_hook(carrier.keep, with_kwargs=True))
        is_dropout = isinstance(tap, nn.Dropout)
        handles.append(
            tap.register_forward_pre_hook(carrier.add_before) if is_dropout else tap.register_forward_hook(carrier.add)
        )
    branch.hook_handles = handles  # type: ignore[assignment]


def forget_compiled() -> None:
    """Drop all graphs of `torch.compile` in this process; each is made anew at its next call.

    torch guards no module without hooks against its first one, and would leave a new branch out.
    """
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        torch.compiler.reset()


def detach(attention: nn.Module) -> None:
    """Remove the branch of `attention` and its hooks; the module is then as before `attach`."""
    for handle in getattr(attention, CHILD).hook_handles:
        handle.remove()
    delattr(attention, CHILD)


def remove_copied_taps(model: nn.Module) -> None:
    """Remove the hooks of detached branches from copies of the modules that they tapped, which PEFT may have made."""
    for module in model.modules():
        for number, hook in list(module._forward_hooks.items()):
            carrier = getattr(hook, "__self__", None)
            if isinstance(carrier, _Tap) and not hasattr(carrier.attention(), CHILD):
                del module._forward_hooks[number]


def tap_of(model: nn.Module, path: str, skip_position: str) -> nn.Module | None:
    """The module to whose output the skip is added (a dropout: to its input), or None for the attention's own output.

    Args:
        model: holds the attention module.
        path: of the attention module in it.
        skip_position: "attention", or "residual" for behind a post-attention norm.

    A block without a norm of `POST_ATTENTION_NORMS` has one position only, and "residual" is the same as "attention".

    Raises:
        PreskipError: `skip_position` is neither.
    """
    if skip_position not in SKIP_POSITIONS:
        raise PreskipError(f"skip_position={skip_position!r} is not possible: choose {' or '.join(SKIP_POSITIONS)}")
    parent, _, target = path.rpartition(".")
    block = model.get_submodule(parent)
    if target == "self" and hasattr(block, "output"):
        output: Any = block.output
        if isinstance(getattr(output, "dropout", None), nn.Dropout):
            return output.dropout
        dense = output.dense
        # Another adapter may have wrapped it, and unwraps it when merged: the layer inside stays.
        return dense.get_base_layer() if hasattr(dense, "get_base_layer") else dense
    norm = POST_ATTENTION_NORMS.get(type(block).__name__)
    return getattr(block, norm) if norm is not None and skip_position == "residual" else None


def hidden_states_of(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The `hidden_states` [B, T, d] of a call of an attention module: its first argument, or the keyword of that name.

    Raises:
        PreskipError: the call has neither.
    """
    if not args and "hidden_states" not in kwargs:
        raise PreskipError(
            f"the attention was called with {', '.join(kwargs) or 'nothing'} instead of hidden_states: a branch cannot "
            "sit here, leave it out with exclude_modules"
        )
    return args[0] if args else kwargs["hidden_states"]


def with_hidden_states(
    args: tuple, kwargs: dict[str, Any], hidden_states: torch.Tensor
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of the same call with other `hidden_states`, in the place where that call has them."""
    if args:
        return (hidden_states, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden_states}


def replace_input(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of an attention with a branch: it reads what `enrich` makes of its `hidden_states`.

    Raises:
        PreskipError: the call is one of cross-attention.
    """
    if any(kwargs.get(name) is not None for name in ELSEWHERE):
        raise PreskipError(
            f"{type(attention).__name__} runs as cross-attention: a branch can only enrich self-attention"
        )
    enriched = getattr(attention, CHILD).enrich(hidden_states_of(args, kwargs))
    return with_hidden_states(args, kwargs, enriched)


def add_skip(attention: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of an attention with a branch: what goes around it joins its output."""
    skip = getattr(attention, CHILD).content(hidden_states_of(args, kwargs))
    if skip is None:
        return output
    return (output[0] + skip, *output[1:]) if isinstance(output, tuple) else output + skip


class _Tap:
    """Carries one skip from an attention module to the module that follows it in the same block.

    A copy of the tapped module alone, as PEFT makes to train a norm, has the same tap; a copy of the block has its own.

    Args:
        attention: where the skip comes from.

    Attributes:
        pending: the skip on its way.
        of_threads: the same by thread, as several may call the model at once; unknown to a compiled graph.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.attention = weakref.ref(attention)
        self.pending: torch.Tensor | None = None
        self.of_threads: dict[int, torch.Tensor | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tap:
        copied = memo.get(id(self.attention()))
        return self if copied is None else _Tap(copied)

    def __reduce__(self) -> tuple[type[_Tap], tuple[nn.Module | None]]:
        return _Tap, (self.attention(),)

    def keep(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        skip = self.pending = getattr(attention, CHILD).content(hidden_states_of(args, kwargs))
        if not torch.compiler.is_compiling():
            self.of_threads[get_ident()] = skip

    def add(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        skip, self.pending = self.pending, None
        if not torch.compiler.is_compiling():
            skip = self.of_threads.pop(get_ident(), skip)
        return output if skip is None else output + skip

    def add_before(self, module: nn.Module, args: tuple) -> tuple:
        return (self.add(module, args, args[0]), *args[1:])
