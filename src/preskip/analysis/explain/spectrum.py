"""The singular values of W_skip, and how many directions they amount to."""

from __future__ import annotations

import torch

from preskip.runs.explain_schema import Spectrum

SHOWN = 64


def spectrum(weight: torch.Tensor | None) -> Spectrum:
    """Singular values and two ranks of a matrix (the effective rank is that of Roy and Vetterli 2007)."""
    if weight is None:
        return {"spectrum": None, "effective_rank": None, "stable_rank": None}
    values = torch.linalg.svdvals(weight.cpu()).double()
    shown = values[:SHOWN].tolist()
    if values[0] == 0:
        return {"spectrum": shown, "effective_rank": None, "stable_rank": None}
    shares = values / values.sum()
    return {
        "spectrum": shown,
        "effective_rank": torch.special.entr(shares).sum().exp().item(),
        "stable_rank": ((values / values[0]) ** 2).sum().item(),
    }
