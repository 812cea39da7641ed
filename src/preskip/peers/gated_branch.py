"""A branch behind a gate that starts nearly closed, so that it can stay neutral where it has nothing to add.

The idea of Neutral Residues (Talla, Grave and Jégou, arXiv 2410.02744), new blocks that give about 0 on text like that
of pretraining, on the branch of `preskip.branch`. With g one number per token::

    g    = σ(w · x̂ + b)                         at first w = 0, b = −2: g = 0.12 everywhere
    content:  out = Attention(x̂) + g · W_skip (x̂ + W_down σ(W_up x̂))
    preskip:  x̃ = x̂ + g · W_down σ(W_up x̂),  out = Attention(x̃) + g · W_skip x̃

so g = 0 is the base in both, and W_down = W_skip = 0 make the start exact whatever g is. The paper's gate is a ReLU,
trained with an ℓ1 loss on outputs and a share of text like the original; here there is neither (`--keep-weight` is for
that). A ReLU that starts closed would get no gradient, and never open.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from preskip.attach import hidden_states_of, with_hidden_states
from preskip.branch import PreskipBranch, feature, skip
from preskip.branch_settings import BranchSettings
from preskip.errors import PreskipError
from preskip.peers.place import PeerModule, Place
from preskip.sites import input_width

START = -2.0


class GatedBranch(PeerModule):
    """One branch of `settings` and its gate.

    Args:
        width: d of x̂.
        settings: with pre-projection and content skip; `enrich_attention` tells the two forms apart.
    """

    def __init__(self, width: int, settings: BranchSettings) -> None:
        super().__init__()
        self.branch = PreskipBranch(width, settings)
        self.weight = nn.Parameter(torch.empty(1, width))
        self.bias = nn.Parameter(torch.empty(1))
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None  # g and x̃, while the attention computes
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See `PeerModule`."""
        self.branch.reset_parameters()
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, START)

    @property
    def flops_per_token(self) -> int:
        """The matrices', and one multiplication by g per channel of what it scales."""
        d = self.weight.shape[1]
        return self.branch.cost().flops_per_token + 2 * d + d * (1 + self.branch.settings.enrich_attention)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """g of every token, [B, T, d] → [B, T, 1] in fp32."""
        return torch.sigmoid(x.to(self.weight.dtype) @ self.weight.T + self.bias)

    def enrich(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x̂ → g and x̃, the latter in the dtype of x̂."""
        branch, gate = self.branch, self.gate(x)
        added = feature(x, branch.linears, branch.settings, branch.dropout)
        return gate, (x + (gate * added if branch.settings.enrich_attention else added)).to(x.dtype)

    def on_input(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook of the attention."""
        self.pending = _, enriched = self.enrich(hidden_states_of(args, kwargs))
        return with_hidden_states(args, kwargs, enriched) if self.branch.settings.enrich_attention else (args, kwargs)

    def on_output(self, attention: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook of the attention."""
        assert self.pending is not None
        (gate, enriched), self.pending = self.pending, None
        added = (gate * skip(enriched, self.branch.linears)).to(enriched.dtype)
        return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added


def gated_branch(place: Place, **fields: Any) -> dict[str, PeerModule]:
    """Put a gated branch at an attention; the settings are the fields of `BranchSettings`.

    Raises:
        PreskipError: from scratch, or a branch without one of its two parts.
    """
    settings = BranchSettings(**fields)
    if not place.identity:
        raise PreskipError("a gated branch is trained on a frozen model only: leave the arm out")
    if not (settings.preprojection and settings.content_skip):
        raise PreskipError("a gated branch needs the pre-projection and the content skip: leave the arm out")
    made = GatedBranch(input_width(place.attention, place.config.hidden_size), settings)
    made.handles.append(place.attention.register_forward_pre_hook(made.on_input, with_kwargs=True))
    made.handles.append(place.attention.register_forward_hook(made.on_output))
    return {"gated": made}
