"""A training step on a CPU whose freed memory goes back to the system, against one that keeps it: glibc's allocator.

    python benchmarks/allocator.py [--model smollm2] [--dtype bfloat16] [--batch-size 4] [--seq-len 128] [--rounds 3]

By itself glibc gives every freed block of more than 32 MB back, and the system clears its pages again for the next one:
in a step that is the logits, several times over. MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ keep it
(docs/bench.md). They count from a process's start, so each kind of each round is a process; the kinds take turns.

Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import numpy as np
import torch
from train_step import Stepper, spread

from preskip.train.memory import peak_memory

KEEP = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
# Steps of a process, of which the first ones fetch what is kept.
STEPS, WARM = 6, 2


def measure(arguments: argparse.Namespace) -> None:
    """Print the median seconds of a step and the peak memory of this process."""
    with peak_memory(torch.device("cpu")) as peak:
        stepper = Stepper(arguments.arm, arguments)
        seconds = [stepper.step() for _ in range(STEPS)][WARM:]
    print(float(np.median(seconds)), peak.bytes)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--arm", default="content")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments)
        return
    plain = {name: value for name, value in os.environ.items() if name not in KEEP}
    seconds: dict[str, list[float]] = {"returned": [], "kept": []}
    memory = dict.fromkeys(seconds, 0)
    for number in range(arguments.rounds):
        for kind in sorted(seconds, reverse=bool(number % 2)):
            command = [sys.executable, __file__, *sys.argv[1:], "--one"]
            settings = plain | (KEEP if kind == "kept" else {})
            found = subprocess.run(command, env=settings, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
            seconds[kind].append(float(found[-2]))
            memory[kind] = max(memory[kind], int(found[-1]))
    result = {
        "model": arguments.model,
        "median_seconds": {kind: round(float(np.median(values)), 3) for kind, values in seconds.items()},
        "ratio_kept_to_returned": spread(seconds["kept"], seconds["returned"]),
        "peak_bytes": memory,
        "batch": [arguments.batch_size, arguments.seq_len],
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
