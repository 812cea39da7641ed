"""The singular values of W_skip, and how many directions they amount to."""

from __future__ import annotations

from typing import Any

import torch

SHOWN = 64


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
