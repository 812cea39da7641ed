"""Peak memory of one piece of work: the device's own counter on CUDA, the process's resident set elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import torch


class PeakMemory:
    """Result of `peak_memory`; `bytes` is final once the block has ended."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Record the peak memory in bytes while the block runs.

    CUDA uses `torch.cuda.max_memory_allocated`; for other devices the resident set size is sampled, and read
    once more as the block ends: what is still held then is always seen.
    """
    peak = PeakMemory()
    if device.type == "cuda":
        with suppress(Exception):
            torch.cuda.reset_peak_memory_stats(device)
        yield peak
        with suppress(Exception):
            peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    done = threading.Event()

    def sample() -> None:
        with suppress(Exception):  # what only measures must not end the work
            peak.bytes = max(peak.bytes, psutil.Process().memory_info().rss)

    def watch() -> None:
        sample()
        while not done.wait(0.02):
            sample()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        sample()
