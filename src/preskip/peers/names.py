"""The peers by name: what puts each into a block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from preskip.peers.canon import canon
from preskip.peers.gated_attention import gated_attention
from preskip.peers.gated_branch import gated_branch
from preskip.peers.nonlinear_query import nonlinear_query
from preskip.peers.place import PeerModule
from preskip.peers.value_embed import value_embed
from preskip.peers.value_residual import value_residual

# Called with the `Place` and the peer's settings as keywords; gives the modules that were put there, by name.
PEERS: dict[str, Callable[..., dict[str, PeerModule]]] = {
    "canon-a": partial(canon, sites="A"),
    "canon": partial(canon, sites="ABCD"),
    "value-residual": value_residual,
    "value-embed": value_embed,
    "nonlinear-q": nonlinear_query,
    "gated-attention": gated_attention,
    "gated-branch": gated_branch,
}
