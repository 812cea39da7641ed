"""The learned branch by layer: weight norms, and how much each part does on real text.

The functional sizes are ratios of sums over the tokens of held-out text: Σ‖skip output‖ / Σ‖attention output‖, both
where they join the residual stream, and Σ‖x̃ − x̂‖ / Σ‖x̂‖. Sums first, so that a token on which attention gives next to
nothing cannot carry the figure. Norms alone say little: AdamW on pure noise gives norms of the same size
(docs/depth.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from preskip.analysis.branches import LiveBranch, live_branches, observed, skip_weight
from preskip.attach import hidden_states_of
from preskip.data.corpus import clusters, evenly
from preskip.evaluate.texts import TextSet
from preskip.forwards import evaluating
from preskip.quantizing import float_weight
from preskip.runs.schema import DepthRow
from preskip.stats import bootstrap_ratio

SIZES = ("skip_to_attention", "enrichment")
# A profile of a text reads the first window of so many of its documents.
DOCUMENTS = 8


def text_profile(model: nn.Module, text: TextSet) -> list[DepthRow]:
    """`depth_profile` on the first window of some of a text's documents, with intervals over their clusters."""
    firsts = dict(zip(reversed(text.owners), reversed(text.windows), strict=True))
    present = sorted(firsts)
    owners = [present[place] for place in evenly([text.documents[owner].group for owner in present])[:DOCUMENTS]]
    of = clusters([text.documents[owner] for owner in owners])
    return depth_profile(model, [firsts[owner].input_ids[:-1] for owner in owners], owners=of)


def depth_profile(
    model: nn.Module, sequences: Sequence[Sequence[int]], *, owners: Sequence[int] | None = None
) -> list[DepthRow]:
    """One row per layer with an active branch, an adapter's or the model's own; none where there is no branch.

    Args:
        model: a PEFT model or its base, or a model of a `preskip_<type>` architecture.
        sequences: token ids of held-out text, each run on its own; empty leaves the functional sizes None.
        owners: for each sequence the document, or cluster of documents, it is cut from; adds intervals over these.

    Returns:
        With `owners` also the limits (None with fewer than 2 documents) and "documents". With several active adapters
        the norms are those of the first, the sizes those of all together.
    """
    branches = live_branches(model)
    if not branches:
        return []
    rows: list[DepthRow] = []
    for branch, sums in zip(branches, _sums(model, branches, sequences), strict=True):
        _, linears = branch.active()[0]
        skip = skip_weight(linears)
        row: Any = {
            "layer": branch.layer,
            "up_norm": _norm(linears.get("up")),
            "down_norm": _norm(linears.get("down")),
            "skip_norm": skip.norm().item() if skip is not None else 0.0,
        }
        rows.append(row | _sizes(sums, owners))
    return rows


def _norm(linear: nn.Linear | None) -> float:
    return float_weight(linear).norm().item() if linear is not None else 0.0


# For each size, a numerator and a denominator per sequence.
Sums = dict[str, list[tuple[float, float]]]


def _sizes(sums: Sums, owners: Sequence[int] | None) -> dict[str, Any]:
    row: dict[str, Any] = {}
    documents = {}
    for size in SIZES:
        pairs = np.array(sums[size]).reshape(-1, 2)  # [sequences, 2], none where the part is absent
        above, below = pairs.sum(0)
        row[size] = float(above / below) if below > 0 else None
        if owners is None:
            continue
        row |= {f"{size}_low": None, f"{size}_high": None}
        if row[size] is None:
            continue
        _, place = np.unique(np.asarray(owners), return_inverse=True)
        tops, bottoms = (np.bincount(place, weights=column) for column in pairs.T)
        documents[size] = {"above": tops.tolist(), "below": bottoms.tolist()}
        if len(tops) > 1 and bottoms.min() > 0:
            interval = bootstrap_ratio(tops, bottoms)
            row |= {f"{size}_low": interval.low, f"{size}_high": interval.high}
    return row if owners is None else row | {"documents": documents}


@torch.inference_mode()
def _sums(model: nn.Module, branches: Sequence[LiveBranch], sequences: Sequence[Sequence[int]]) -> list[Sums]:
    sums: list[Sums] = [{size: [] for size in SIZES} for _ in branches]
    with evaluating(model), _observers(branches, sums):
        for number, ids in enumerate(sequences):
            model(input_ids=torch.tensor([list(ids)], device=next(model.parameters()).device), use_cache=False)
            for pairs in chain.from_iterable(layer.values() for layer in sums):
                if len(pairs) > number + 1:  # the layer ran several times in the pass
                    above, below = zip(*pairs[number:], strict=True)
                    pairs[number:] = [(sum(above), sum(below))]
    return sums


@contextmanager
def _observers(branches: Sequence[LiveBranch], sums: Sequence[Sums]) -> Iterator[None]:
    """Observe every branch while the context lasts."""
    with ExitStack() as stack:
        for branch, own in zip(branches, sums, strict=True):
            stack.enter_context(_observe(branch, own))
        yield


@contextmanager
def _observe(branch: LiveBranch, sums: Sums) -> Iterator[None]:
    """See x̂ and what the skip will be added to, the latter by hooks that run before the branch's own."""
    module, attention = branch.module, branch.attention
    enrich = module.enrich
    skips: list[torch.Tensor | None] = []

    def compare_inputs(x):
        wide = x.float()
        sums["enrichment"].append((_length(enrich(wide) - wide), _length(wide)))

    def keep(_, args, kwargs, output):
        skips.append(module.content(hidden_states_of(args, kwargs)))

    def compare(_, args, output):
        skip = skips.pop()
        if skip is not None:
            joined = output[0] if isinstance(output, tuple) else output
            sums["skip_to_attention"].append((_length(skip), _length(joined)))

    # Prepended in reverse: on one module `keep` runs before `compare`.
    with (
        observed(branch, compare_inputs),
        (branch.tap or attention).register_forward_hook(compare, prepend=True),
        attention.register_forward_hook(keep, with_kwargs=True, prepend=True),
    ):
        yield


def _length(x: torch.Tensor) -> float:
    """Σ over tokens of ‖x‖, [B, T, d]."""
    return x.float().norm(dim=-1).sum().item()
