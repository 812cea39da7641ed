"""The learned branch by layer: weight norms, and how much each part does on real text.

The functional sizes are means over tokens of held-out text: ‖skip output‖ / ‖attention output‖ and ‖x̃ − x̂‖ / ‖x̂‖.
Norms alone say little: AdamW on pure noise gives norms of the same size (see docs/method.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from preskip.adapter.layer import PreskipLayer
from preskip.attach import CHILD, find_sites


def depth_profile(
    model: nn.Module, sequences: Sequence[Sequence[int]], adapter_name: str = "default"
) -> list[dict[str, Any]]:
    """One row per layer with a branch.

    Args:
        model: the base model with a Preskip adapter injected (`peft_model.get_base_model()`).
        sequences: token ids of held-out text, each run on its own; empty leaves the functional sizes None.
        adapter_name: which adapter.

    Returns:
        Rows with layer, up_norm, down_norm, skip_norm (Frobenius norms; 0 for an absent part), skip_to_attention and
        enrichment (means over tokens, or None).
    """
    layers = {}
    for site in find_sites(model).attentions:
        layer = getattr(model.get_submodule(site.name), CHILD, None)
        if isinstance(layer, PreskipLayer) and adapter_name in layer.settings:
            layers[site.name] = (site.layer, layer)
    sums = _functional_sizes(model, {name: layer for name, (_, layer) in layers.items()}, sequences)
    rows = []
    for name, (index, layer) in layers.items():
        linears = layer.linears(adapter_name)
        skip = _product(linears)
        rows.append(
            {
                "layer": index,
                "up_norm": _norm(linears.get("up")),
                "down_norm": _norm(linears.get("down")),
                "skip_norm": skip.norm().item() if skip is not None else 0.0,
                **sums[name],
            }
        )
    return rows


def _norm(linear: nn.Linear | None) -> float:
    return linear.weight.detach().norm().item() if linear is not None else 0.0


def _product(linears: dict[str, nn.Linear]) -> torch.Tensor | None:
    if "skip" in linears:
        return linears["skip"].weight.detach()
    if "skip_up" in linears:
        return linears["skip_up"].weight.detach() @ linears["skip_down"].weight.detach()
    return None


@torch.inference_mode()
def _functional_sizes(
    model: nn.Module, layers: dict[str, PreskipLayer], sequences: Sequence[Sequence[int]]
) -> dict[str, dict[str, float | None]]:
    totals = {name: {"skip_to_attention": 0.0, "enrichment": 0.0, "tokens": 0, "has_skip": 0.0} for name in layers}
    was_training = model.training
    model.eval()
    with _observers(model, layers, totals):
        for ids in sequences:
            model(input_ids=torch.tensor([list(ids)], device=next(model.parameters()).device), use_cache=False)
    model.train(was_training)
    sizes: dict[str, dict[str, float | None]] = {}
    for name, total in totals.items():
        tokens = total["tokens"]
        sizes[name] = {
            "skip_to_attention": total["skip_to_attention"] / tokens if tokens and total["has_skip"] else None,
            "enrichment": total["enrichment"] / tokens if tokens else None,
        }
    return sizes


@contextmanager
def _observers(
    model: nn.Module, layers: dict[str, PreskipLayer], totals: dict[str, dict[str, float]]
) -> Iterator[None]:
    """Hooks that run before the branch's own, so that they see x̂ and the bare attention output."""
    handles = []
    for name, layer in layers.items():
        module, total = model.get_submodule(name), totals[name]

        def before(attention, args, kwargs, layer=layer, total=total):
            x = (args[0] if args else kwargs["hidden_states"]).float()
            total["enrichment"] += _ratio(layer.enrich(x) - x, x)

        def after(attention, args, kwargs, output, layer=layer, total=total):
            attention_input = args[0] if args else kwargs["hidden_states"]
            attention_output = output[0] if isinstance(output, tuple) else output
            skip = layer.content(attention_input)
            total["tokens"] += attention_input.shape[0] * attention_input.shape[1]
            if skip is not None and skip.shape == attention_output.shape:
                total["has_skip"] = 1.0
                total["skip_to_attention"] += _ratio(skip, attention_output)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> float:
    """Sum over tokens of ‖part‖ / ‖whole‖ for [B, T, d] tensors."""
    return (part.float().norm(dim=-1) / whole.float().norm(dim=-1).clamp_min(1e-12)).sum().item()
