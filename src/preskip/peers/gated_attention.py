"""Gated attention: what each head gives passes a gate of its own before the heads are put together.

Qiu et al., "Gated Attention for Large Language Models" (arXiv 2505.06708), the headwise gate behind the heads::

    y_h ← y_h · σ(W_g x̂)_h        W_g: d → H, no bias, on what the queries read, before the output projection

From scratch W_g ~ N(0, the model's initializer range), as its other matrices. transformers' `Qwen3NextAttention` has
the elementwise form of it, with a gate per channel of a head. On a frozen model the authors saw no gain from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from preskip.attach import hidden_states_of
from preskip.errors import PreskipError
from preskip.peers.place import PeerModule, Place

# Names of the output projection within an attention of transformers: Llama and its kin, GPT-NeoX, GPT-2.
OUTPUTS = ("o_proj", "dense", "c_proj")


class HeadGate(PeerModule):
    """y [B, T, H · h] → y · σ(W_g x̂), a factor per head.

    Args:
        heads: number H of query heads.
        width: d of x̂.
        std: of the initial weights.
    """

    def __init__(self, heads: int, width: int, std: float) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(heads, width))
        self.read: torch.Tensor | None = None  # x̂, while the attention computes
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See `PeerModule`."""
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, heads: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The heads' outputs and x̂ [B, T, d] → the gated outputs, in the dtype of the former."""
        gate = torch.sigmoid(x.to(self.weight.dtype) @ self.weight.T)  # [B, T, H]
        gated = heads.unflatten(-1, (gate.shape[-1], -1)) * gate[..., None]
        return gated.flatten(-2).to(heads.dtype)

    def on_input(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the attention: remember what the queries read."""
        self.read = hidden_states_of(args, kwargs)

    def on_heads(self, projection: nn.Module, args: tuple) -> tuple:
        """Forward pre-hook of the output projection."""
        assert self.read is not None
        x, self.read = self.read, None
        return (self(args[0], x), *args[1:])


def gated_attention(place: Place) -> dict[str, PeerModule]:
    """Put a gate per head into an attention.

    Raises:
        PreskipError: on a frozen model, or the attention has no output projection of a known name.
    """
    if place.identity:
        raise PreskipError("gated attention is trained from scratch only: leave the arm out")
    output = next((name for name in OUTPUTS if isinstance(getattr(place.attention, name, None), nn.Module)), None)
    if output is None:
        raise PreskipError(f"{type(place.attention).__name__} has none of {', '.join(OUTPUTS)}: leave the arm out")
    config = place.config
    made = HeadGate(config.num_attention_heads, config.hidden_size, config.initializer_range)
    # Behind a branch's hook: the gate reads what the queries read.
    made.handles.append(place.attention.register_forward_pre_hook(made.on_input, with_kwargs=True))
    made.hook_child(place.tokens, place.attention, output, made.on_heads, before=True)
    return {"gate": made}
