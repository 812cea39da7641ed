"""What one layer's part of the branch is worth: the loss on held-out text when it alone is switched off.

Two parts, each switched off in one layer while everything else stays:

* skip: what joins attention's output (W_skip · x̃, or the parallel adapter's features) is not added.
* enrichment: attention reads x̂ instead of x̃; the skip still carries x̃.

Weights are not touched. Blocks below the switched layer see what they saw before, so they are not computed again: their
outputs are kept from the pass with everything on, which halves the cost.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from preskip.adapter import base_model
from preskip.analysis.branches import PARTS, LiveBranch, live_branches, replaced
from preskip.data.blocks import Window
from preskip.errors import PreskipError
from preskip.evaluate.likelihood import batches, default_batch_tokens, score_sequences
from preskip.forwards import forward_replaced, forwards_counted
from preskip.peers.value_residual import ValueResidual
from preskip.progress import Advance, no_progress
from preskip.runs.schema import AblationRow
from preskip.sites import AttentionSite
from preskip.stats import paired_ratio_difference

# The two parts of a layer that has two, off together.
BOTH = "both"


def ablate(
    model: nn.Module,
    windows: Sequence[Window],
    owners: Sequence[int],
    sizes: Sequence[int],
    *,
    parts: Sequence[str] = PARTS,
    batch_tokens: int | None = None,
    advance: Advance = no_progress,
) -> list[AblationRow]:
    """Switch off one part of one layer at a time and score the same windows.

    Args:
        model: a causal language model with branches, its own or an active adapter's, also as a PEFT model. With several
            active adapters, all of a layer are switched off together.
        windows: held-out windows; all of a document's, or its bytes do not fit.
        owners: for each window the index of its document in `sizes`.
        sizes: UTF-8 bytes of the scored text of each document.
        parts: which of "skip", "enrichment" and "both".
        batch_tokens: upper bound of padded tokens per forward pass. One batch's block outputs are held in memory.
        advance: progress, called as advance(scored passes over one batch, note); see `ablation_passes`.

    Returns:
        Rows {"layer", "part", "difference", "low", "high", "documents"}: bits per byte off minus on, positive where the
        part helps, with a 95 % interval over documents; "documents" holds nats off minus on ("above") and bytes · ln 2
        ("below") per document, for `preskip.stats.trends`. A layer without a part has no row for it.

    Raises:
        PreskipError: no layer has a branch, fewer than 2 documents, or a loss that is NaN.
    """
    chosen = sorted(set(owners))
    if len(chosen) < 2:
        raise PreskipError(f"{len(chosen)} document is too few for an interval: ablate on 2 or more held-out documents")
    switches = _switches(model, parts)
    if not switches:
        raise PreskipError("no layer has an active Preskip branch to switch off: insert one first")
    base = base_model(model)
    on = np.zeros(len(windows))
    off = np.zeros((len(switches), len(windows)))
    done = 0
    for batch in _batches(model, windows, batch_tokens):
        texts = [windows[index] for index in batch]
        kept = _KeptBlocks(base, {branch.site.stack for branch, _ in switches})
        with kept.recorded():
            on[batch] = _nats(model, texts, batch_tokens)
        advance(done := done + 1, "")
        for row, (branch, part) in enumerate(switches):
            with kept.replayed_below(branch.site), ExitStack() as stack:
                for one in PARTS if part == BOTH else (part,):
                    stack.enter_context(switched_off(branch, one))
                off[row, batch] = _nats(model, texts, batch_tokens)
            advance(done := done + 1, f"layer {branch.layer} without {part}")
    place = {owner: index for index, owner in enumerate(chosen)}
    documents = np.array([place[owner] for owner in owners])
    bytes_of = np.array([sizes[owner] for owner in chosen])
    nats_on = np.bincount(documents, weights=on)
    rows: list[AblationRow] = []
    for (branch, part), nats in zip(switches, off, strict=True):
        nats_off = np.bincount(documents, weights=nats)
        interval = paired_ratio_difference(nats_off, nats_on, bytes_of)
        rows.append(
            {
                "layer": branch.layer,
                "part": part,
                "difference": interval.value,
                "low": interval.low,
                "high": interval.high,
                "documents": {"above": (nats_off - nats_on).tolist(), "below": (bytes_of * math.log(2)).tolist()},
            }
        )
    return rows


def ablation_passes(
    model: nn.Module, windows: Sequence[Window], batch_tokens: int | None = None, parts: Sequence[str] = PARTS
) -> int:
    """Number of passes that `ablate` will make, for a progress bar."""
    return (1 + len(_switches(model, parts))) * len(_batches(model, windows, batch_tokens))


def _switches(model: nn.Module, parts: Sequence[str]) -> list[tuple[LiveBranch, str]]:
    """What is switched off, one at a time; both parts together only in layers that have both."""
    switches = []
    for branch in live_branches(model):
        own = branch.parts
        switches += [(branch, part) for part in (*own, *([BOTH] if len(own) > 1 else [])) if part in parts]
    return switches


@contextmanager
def switched_off(branch: LiveBranch, part: str) -> Iterator[None]:
    """Switch one of `PARTS` off in one layer while the block runs; weights, hooks and outputs are then as before."""
    if part not in PARTS:
        raise PreskipError(f"part {part!r} cannot be switched off: choose {' or '.join(PARTS)}")
    if part == "skip":
        with replaced(branch, content=lambda attention_input: None):
            yield
        return
    enrich, content = branch.module.enrich, branch.module.content
    kept: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[:] = [enrich(x)]
        return x

    # Attention, and what a peer puts into it, is given x̂; the skip still carries x̃.
    with replaced(branch, enrich=keep, content=lambda attention_input: content(kept[0])):
        yield


class _KeptBlocks:
    """Outputs of the blocks of some stacks in one pass over a batch, in the order of their calls."""

    def __init__(self, base: nn.Module, stacks: set[str]) -> None:
        self.blocks = {stack: list(base.get_submodule(stack)) for stack in stacks}  # type: ignore[call-overload]
        self.decoders = {stack: base.get_submodule(stack.rpartition(".")[0]) for stack in stacks}
        self.outputs: dict[nn.Module, list[Any]] = defaultdict(list)
        config = getattr(base, "config", None)
        # Blocks that read an earlier block's keys or values need that block to run.
        shares = getattr(config.get_text_config() if config else None, "num_kv_shared_layers", 0)
        self.is_usable = not (shares or any(isinstance(module, ValueResidual) for module in base.modules()))

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Keep what every block gives while the context lasts.

        A block that runs several times in a pass reads what later blocks gave: then nothing can be replayed.
        """

        def keep(block: nn.Module, args: tuple, output: Any) -> None:
            self.outputs[block].append(output)

        with ExitStack() as stack, forwards_counted(self.decoders.values()) as passes:
            for block in (block for blocks in self.blocks.values() for block in blocks):
                stack.callback(block.register_forward_hook(keep).remove)
            yield
        for name, blocks in self.blocks.items():
            self.is_usable &= {len(self.outputs[block]) for block in blocks} == {passes[self.decoders[name]]}

    @contextmanager
    def replayed_below(self, site: AttentionSite) -> Iterator[None]:
        """Blocks below the site's give their kept outputs and compute nothing."""
        with ExitStack() as stack:
            for block in self.blocks[site.stack][: site.layer] if self.is_usable else ():
                outputs = iter(self.outputs[block])
                stack.enter_context(forward_replaced(block, lambda *args, _outputs=outputs, **kwargs: next(_outputs)))
            yield


def _nats(model: nn.Module, windows: Sequence[Window], batch_tokens: int | None) -> list[float]:
    return [score.nll for score in score_sequences(model, windows, batch_tokens=batch_tokens)]


def _batches(model: nn.Module, windows: Sequence[Window], batch_tokens: int | None) -> list[list[int]]:
    """Indices of windows of similar length that one forward pass takes."""

    def length(index: int) -> int:
        return len(windows[index].input_ids)

    size = batch_tokens or default_batch_tokens(next(model.parameters()).device)
    return list(batches(sorted(range(len(windows)), key=length, reverse=True), size, length))
