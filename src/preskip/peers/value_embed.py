"""Value embeddings: what a token is called joins its values, from a table of its own, through a gate per head.

From modded-nanogpt's speedrun and nanochat (nanochat/gpt.py)::

    v ← v + g ⊙ VE_l[token]      g = 3 σ(W_g · x̂[:12]), one gate per key-value head, W_g: 12 → heads

Every second layer has a table of vocabulary × width of the values, the last one among them. VE_l ~ U(±√(3/d)), as
nanochat's value projections are; W_g = 0, as the speedrun's gates are, so that g = 3/2 at first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from preskip.errors import PreskipError
from preskip.peers.place import PeerModule, Place
from preskip.peers.tokens import Tokens
from preskip.peers.values import Values, values_of

# Features of x̂ that the gate reads, and the most that it gives.
GATE_FEATURES, GATE_MOST = 12, 3.0


class ValueEmbed(PeerModule):
    """V → V + g ⊙ VE[token], [B, T, W] → [B, T, W].

    Args:
        values: where the block makes them.
        tokens: knows the token ids.
        vocabulary: number of tokens.
        width: d of x̂.
    """

    def __init__(self, values: Values, tokens: Tokens, *, vocabulary: int, width: int) -> None:
        super().__init__()
        self.values, self.tokens, self.width = values, tokens, width
        self.table = nn.Embedding(vocabulary, values.width)
        self.gate = nn.Parameter(torch.empty(values.heads, min(GATE_FEATURES, width)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See `PeerModule`."""
        limit = math.sqrt(3 / self.width)
        nn.init.uniform_(self.table.weight, -limit, limit)
        nn.init.zeros_(self.gate)

    def forward(self, own: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """V and x̂ [B, T, d] → V + g ⊙ VE[token].

        Raises:
            PreskipError: the pass was given embeddings in place of token ids.
        """
        if self.tokens.ids is None:
            raise PreskipError("value embeddings are looked up by token: give input_ids, not inputs_embeds")
        gate = GATE_MOST * torch.sigmoid(
            x[..., : self.gate.shape[1]].to(self.gate.dtype) @ self.gate.T
        )  # [B, T, heads]
        embedded = self.table(self.tokens.ids.to(own.device)).unflatten(-1, (self.values.heads, -1))
        return own + (gate[..., None] * embedded).flatten(-2)

    def on_output(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Forward hook of the projection."""
        return self.values.write(output, self(self.values.read(output), args[0]))


def value_embed(place: Place, layers: Sequence[int]) -> dict[str, PeerModule]:
    """Put value embeddings into a block.

    Args:
        place: the block.
        layers: indices of the blocks that have a table.

    Raises:
        PreskipError: on a frozen model, or it is not known where the attention makes its values.
    """
    if place.identity:
        raise PreskipError("value embeddings are trained from scratch only: leave the arm out")
    if place.layer not in layers:
        return {}
    values = values_of(place)
    config = place.config
    made = ValueEmbed(values, place.tokens, vocabulary=config.vocab_size, width=config.hidden_size)
    made.hook_child(place.tokens, place.attention, values.projection, made.on_output)
    return {"mix": made}
