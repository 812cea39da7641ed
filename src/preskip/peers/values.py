"""Where an attention makes its values: in a projection of their own, or as a part of one with queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from preskip.errors import PreskipError
from preskip.peers.place import Place


@dataclass(frozen=True, kw_only=True)
class Values:
    """The values in the output of a projection.

    Attributes:
        projection: name of the module in the attention.
        heads: key-value heads.
        width: of all heads together, W.
        by_head: whether the output holds query, key and value of one head after the other (GPT-NeoX).
        part: whether the values are the last W of more channels.
    """

    projection: str
    heads: int
    width: int
    by_head: bool = False
    part: bool = False

    def read(self, output: torch.Tensor) -> torch.Tensor:
        """The values [B, T, W] of what the projection gives."""
        if self.by_head:
            return output.unflatten(-1, (self.heads, 3, -1))[..., 2, :].flatten(-2)
        return output[..., -self.width :] if self.part else output

    def write(self, output: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The projection's output with other values [B, T, W]."""
        values = values.to(output.dtype)
        if self.by_head:
            heads = output.unflatten(-1, (self.heads, 3, -1))
            own = values.unflatten(-1, (self.heads, 1, -1))
            return torch.cat((heads[..., :2, :], own), dim=-2).flatten(-3)
        return torch.cat((output[..., : -self.width], values), dim=-1) if self.part else values


def values_of(place: Place) -> Values:
    """Where the attention of a block makes its values.

    Raises:
        PreskipError: it is not known.
    """
    attention, config = place.attention, place.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    own: Any = getattr(attention, "v_proj", None)
    if own is not None and getattr(own, "out_features", None) == width:
        return Values(projection="v_proj", heads=heads, width=width)
    kind = type(attention).__name__
    if kind == "GPTNeoXAttention":
        return Values(projection="query_key_value", heads=heads, width=width, by_head=True)
    joint = {"GPT2Attention": "c_attn", "Phi3Attention": "qkv_proj"}.get(kind)
    if joint is None:
        raise PreskipError(f"it is not known where {kind} makes its values: leave the arm out")
    return Values(projection=joint, heads=heads, width=width, part=True)
