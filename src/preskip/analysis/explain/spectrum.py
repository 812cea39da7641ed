"""The singular values of W_skip, and how many directions they amount to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

SHOWN = 64


def skip_weight(linears: dict[str, nn.Linear]) -> torch.Tensor | None:
    """W_skip [d, d] of a branch's matrices, the product of a low-rank one, or None."""
    if "skip" in linears:
        return linears["skip"].weight.detach().float()
    if "skip_up" in linears:
        return linears["skip_up"].weight.detach().float() @ linears["skip_down"].weight.detach().float()
    return None


def spectrum(weight: torch.Tensor | None) -> dict[str, Any]:
    """Singular values and two ranks of a matrix.

    Args:
        weight: [out, in], or None.

    Returns:
        {"spectrum", "effective_rank", "stable_rank"}: the largest `SHOWN` singular values, descending; exp of the
        entropy of all of them over their sum (Roy and Vetterli 2007); Σσ² / σ₁². All None without a matrix, the ranks
        None for one that is 0.
    """
    if weight is None:
        return {"spectrum": None, "effective_rank": None, "stable_rank": None}
    values = torch.linalg.svdvals(weight.cpu()).double()
    shown = {"spectrum": values[:SHOWN].tolist()}
    if values[0] == 0:
        return {**shown, "effective_rank": None, "stable_rank": None}
    shares = values / values.sum()
    return {
        **shown,
        "effective_rank": torch.special.entr(shares).sum().exp().item(),
        "stable_rank": ((values / values[0]) ** 2).sum().item(),
    }
