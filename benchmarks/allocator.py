"""A training step on a CPU whose freed memory goes back to the system, against one that keeps it: glibc's allocator.

    python benchmarks/allocator.py [--model smollm2] [--dtype bfloat16] [--batch-size 4] [--seq-len 128] [--rounds 5]

By itself glibc gives every freed block of more than 32 MB back, and the system clears its pages again for the next one:
in a step that is the logits, several times over. The environment variables MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ raise that limit for a whole process (docs/bench.md); here `mallopt` sets it both ways in turn
within one process, so that a change of the machine's speed meets both. Of the two steps of a turn the second counts:
the first one fetches what is kept. Peak memory is the resident set in either kind of turn, one arm per process.

Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys

import numpy as np
import torch
from train_step import Stepper

from preskip.train.memory import peak_memory

# Of glibc's malloc.h: option numbers of mallopt.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
# Where glibc's own limits stop rising; the most that mallopt takes.
LIMITS = {"returned": (32 << 20, 64 << 20), "kept": (2**31 - 1, 2**31 - 1)}


def set_limits(libc: ctypes.CDLL, kind: str) -> None:
    """Let the allocator keep what is freed, or return it, which it does with all that it has kept."""
    mmap, trim = LIMITS[kind]
    if not (libc.mallopt(MMAP_THRESHOLD, mmap) and libc.mallopt(TRIM_THRESHOLD, trim)):
        sys.exit("error: this system's allocator does not take the limits: it is not glibc's")
    libc.malloc_trim(0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--arm", default="content")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        sys.exit("error: this system's allocator is not glibc's")
    stepper = Stepper(arguments.arm, arguments)
    stepper.step()
    seconds: dict[str, list[float]] = {kind: [] for kind in LIMITS}
    memory = dict.fromkeys(LIMITS, 0)
    for number in range(arguments.rounds):
        for kind in sorted(LIMITS, reverse=bool(number % 2)):
            set_limits(libc, kind)
            with peak_memory(torch.device("cpu")) as peak:
                stepper.step()
                seconds[kind].append(stepper.step())
            memory[kind] = max(memory[kind], peak.bytes)
    ratios = np.array(seconds["kept"]) / np.array(seconds["returned"])
    result = {
        "model": arguments.model,
        "median_seconds": {kind: round(float(np.median(values)), 3) for kind, values in seconds.items()},
        "ratio_kept_to_returned": {
            "median": round(float(np.median(ratios)), 3),
            "min": round(float(ratios.min()), 3),
            "max": round(float(ratios.max()), 3),
        },
        "peak_bytes": memory,
        "batch": [arguments.batch_size, arguments.seq_len],
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
