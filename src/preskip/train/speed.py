"""What the machine's matrix products reach: the peak that utilisation is held against."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch


@torch.inference_mode()
def measured_peak(
    device: torch.device | str, dtype: torch.dtype, *, sizes: Sequence[int] | None = None, seconds: float = 0.6
) -> float:
    """FLOPs per second of square matrix products: what model FLOPs utilisation is held against.

    The quickest single product counts: on a machine that does other work too, a mean would say more about that.

    Args:
        device: where.
        dtype: of the factors.
        sizes: of the square matrices, tried in turn; None takes 512 to 2048 on a CPU, 4096 and 8192 elsewhere.
        seconds: how long to measure, over all sizes.
    """
    device = torch.device(device)
    on_cpu = device.type == "cpu"
    sizes = sizes or ((512, 1024, 2048) if on_cpu else (4096, 8192))
    best = 0.0
    for size in sizes:
        a = torch.randn(size, size, device=device).to(dtype)
        a @ a
        started = time.perf_counter()
        while time.perf_counter() - started < seconds / len(sizes):
            synchronise(device)
            begin = time.perf_counter()
            a @ a
            synchronise(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def synchronise(device: torch.device) -> None:
    """Wait for what the device still computes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
