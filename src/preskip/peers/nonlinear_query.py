"""Nonlinear queries: a small MLP around the identity in place of the query's matrix, with as many weights.

The method of arXiv 2603.13381, after its code (a nanoGPT, query mode "residual_gelu")::

    q = x̂ + LN(W₂ GELU(W₁ RMSNorm(x̂)))      W₁: d → d/2, W₂: d/2 → d, no biases, in place of W_Q: d → d

Matrices start at N(0, the model's initializer range), gains at 1, both norms with ε = 1e-5. As q is a sum of two normed
terms, the code halves attention's scale to 1 / (2√h), and so does this where the model does not norm its queries
afterwards; the repository's README has a factor ½ around the sum instead. The gains are 2d weights more than W_Q has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from preskip.errors import PreskipError
from preskip.peers.place import PeerModule, Place

EPSILON = 1e-5


class NonlinearQuery(PeerModule):
    """x̂ → x̂ + LN(W₂ GELU(W₁ RMSNorm(x̂))), [B, T, d] → [B, T, d].

    Args:
        width: d.
        std: of the initial matrices.
    """

    def __init__(self, width: int, std: float) -> None:
        super().__init__()
        self.std, self.shape = std, (width,)
        self.up = nn.Parameter(torch.empty(width // 2, width))
        self.down = nn.Parameter(torch.empty(width, width // 2))
        self.norm = nn.Parameter(torch.empty(width))
        self.norm_out = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See `PeerModule`."""
        for matrix in (self.up, self.down):
            nn.init.normal_(matrix, std=self.std)
        for gain in (self.norm, self.norm_out):
            nn.init.ones_(gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x̂ → q."""
        inner = F.gelu(F.linear(F.rms_norm(x, self.shape, self.norm, EPSILON), self.up))
        return x + F.layer_norm(F.linear(inner, self.down), self.shape, self.norm_out, eps=EPSILON)

    def on_output(self, projection: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Forward hook of what stands in the query projection's place."""
        return self(output)


def nonlinear_query(place: Place) -> dict[str, PeerModule]:
    """Replace the query projection of an attention.

    Raises:
        PreskipError: on a frozen model; queries are made together with keys and values, or are not as wide as x̂.
    """
    if place.identity:
        raise PreskipError("nonlinear queries are trained from scratch only: leave the arm out")
    attention: Any = place.attention
    own = getattr(attention, "q_proj", None)
    if not isinstance(own, nn.Linear):
        raise PreskipError(
            f"{type(attention).__name__} makes queries, keys and values in one matrix, where a part cannot be "
            "replaced: leave the arm out"
        )
    if own.in_features != own.out_features:
        raise PreskipError(
            f"queries of width {own.out_features} cannot begin as x̂ of width {own.in_features}: give heads and head "
            "width whose product is the hidden size, or leave the arm out"
        )
    made = NonlinearQuery(own.in_features, place.config.initializer_range)
    attention.q_proj = nn.Identity()
    made.hook_child(place.tokens, attention, "q_proj", made.on_output)
    if not hasattr(attention, "q_norm"):
        attention.scaling = attention.scaling / 2
    return {"query": made}
