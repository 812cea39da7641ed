"""What the enrichment does to the attention pattern: entropy, and the weight on the first token.

In each layer attention runs twice on the same input x̂: on x̃, as the model does, and on x̂. Everything else stays as it
is, so the difference is what this layer's enrichment does to this layer's pattern.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from preskip.adapter import base_model
from preskip.analysis.branches import LiveBranch, observed
from preskip.attach import with_hidden_states
from preskip.evaluate.likelihood import head_only_at
from preskip.peers.gated_attention import HeadGate
from preskip.peers.value_residual import ValueResidual
from preskip.progress import Advance, no_progress


@torch.inference_mode()
def attention_changes(
    model: nn.Module,
    branches: Sequence[LiveBranch],
    sequences: Sequence[Sequence[int]],
    advance: Advance = no_progress,
) -> NDArray[np.float64]:
    """Sums over tokens and their number, of a causal language model, also a PEFT model.

    Attention is computed in transformers' plain way ("eager"), which gives its weights, one sequence at a time.

    Returns:
        [layers, sequences, 3]: entropy in nats on minus off and weight on the first token on minus off, each the mean
        over heads, summed over all tokens but the first; and the number of these. NaN where a layer has no enrichment,
        or its attention does not tell its weights.
    """
    base = base_model(model)
    sums = np.full((len(branches), len(sequences), 3), np.nan)
    last = torch.tensor([0]), torch.tensor([-1])  # logits are not asked for, and cost a sixth of a small model
    with _eager(base) as options, head_only_at(base, *last), ExitStack() as stack:
        found: dict[int, NDArray[np.float64]] = {}
        for index, branch in enumerate(branches):
            if "enrichment" in branch.parts:
                stack.enter_context(_compared(branch, index, found))
        for number, ids in enumerate(sequences):
            base(input_ids=torch.tensor([list(ids)], device=base.device), use_cache=False, **options)
            for index, row in found.items():
                sums[index, number] = row
            found.clear()
            advance(number + 1, "")
    return sums


@contextmanager
def _compared(branch: LiveBranch, index: int, found: dict[int, NDArray[np.float64]]) -> Iterator[None]:
    plain: list[torch.Tensor] = []

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        x = plain.pop()
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(weights, torch.Tensor) or weights.dim() != 4:
            return
        args, kwargs = with_hidden_states(args, kwargs, x)
        with _run_again(branch.block, x):
            off = module.forward(*args, **kwargs)
        (entropy_on, sink_on), (entropy_off, sink_off) = describe(weights), describe(off[1])
        found[index] = np.array([entropy_on - entropy_off, sink_on - sink_off, weights.shape[2] - 1])

    with (
        observed(branch, plain.append),
        branch.attention.register_forward_hook(after, prepend=True, with_kwargs=True),
    ):
        yield


@contextmanager
def _run_again(block: nn.Module, x: torch.Tensor) -> Iterator[None]:
    """Let attention run once more on x: a gate needs its input anew, later layers the values of the first run."""
    before = []
    for peer in block.modules():
        if isinstance(peer, HeadGate):
            peer.read = x
        elif isinstance(peer, ValueResidual):
            before.append((peer.tokens, peer.tokens.first_value))
    yield
    for tokens, value in before:
        tokens.first_value = value


def describe(weights: torch.Tensor) -> tuple[float, float]:
    """Entropy in nats and weight on the first token of attention weights [1, H, T, T]: means over heads, summed over
    the tokens behind the first.
    """
    rows = weights[0, :, 1:].double()
    return torch.special.entr(rows).sum(-1).mean(0).sum().item(), rows[..., 0].mean(0).sum().item()


@contextmanager
def _eager(base: Any) -> Iterator[dict[str, Any]]:
    """Attention in the plain way; gives the options of the forward pass that a model needs for it."""
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")
    try:
        # Falcon's attention keeps the way it was built with, and gives weights only when asked.
        yield {} if base.config._attn_implementation == "eager" else {"output_attentions": True}
    finally:
        base.set_attn_implementation(before)
