"""Training step of `preskip` against LoRA with as many parameters: time paired step by step, peak memory per process.

Both arms stand on their own copy of the same base and train the same batch in turn, so that a change of the machine's
speed meets both. The roofline of the comparison: both read every base weight and multiply every base matrix twice
(forward, and backward for the activations); they differ in their own 6 FLOPs per parameter and token, equal here, and
in how many small matrices these are spread over.

    python benchmarks/train_step.py [--model smollm2] [--batch-size 8] [--seq-len 128] [--rounds 8]

Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch

from preskip import BranchSettings
from preskip.arms import ARMS, ArmContext, attention_paths, branch_parameters
from preskip.assets import load_model
from preskip.train.memory import peak_memory


def arm_on_base(name: str, model: str, dtype: torch.dtype) -> torch.nn.Module:
    """The arm's PEFT model on a fresh copy of the base."""
    from peft import get_peft_model

    base = load_model(model, dtype=dtype)
    settings = BranchSettings()
    targets = attention_paths(base)
    budget = branch_parameters(base, settings, targets)
    context = ArmContext(
        base=base,
        settings=settings,
        skip_position="attention",
        layers=None,
        targets=tuple(targets),
        budget=budget,
    )
    return get_peft_model(base, ARMS[name].make_config(context)).train()


class Stepper:
    """One optimiser step of one arm on random tokens."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.model = arm_on_base(name, arguments.model, getattr(torch, arguments.dtype))
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in trainable)
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4)
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.config.vocab_size
        self.ids = torch.randint(vocabulary, (arguments.batch_size, arguments.seq_len), generator=generator)

    def step(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


def spread(seconds: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The ratios of paired times: median, lowest and highest."""
    ratios = np.array(seconds) / np.array(others)
    found = {"median": np.median(ratios), "min": ratios.min(), "max": ratios.max()}
    return {name: round(float(value), 3) for name, value in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        with peak_memory(torch.device("cpu")) as peak:
            stepper = Stepper(arguments.memory_of, arguments)
            for _ in range(3):
                stepper.step()
        print(peak.bytes)
        return
    memory = {}
    for name in ("preskip", "lora"):
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", name]
        memory[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    steppers = {name: Stepper(name, arguments) for name in ("preskip", "lora")}
    for stepper in steppers.values():
        stepper.step()
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for number in range(arguments.rounds):
        for name in sorted(steppers, reverse=bool(number % 2)):
            seconds[name].append(steppers[name].step())
    result = {
        "parameters": {name: stepper.parameters for name, stepper in steppers.items()},
        "median_seconds": {name: round(float(np.median(values)), 3) for name, values in seconds.items()},
        "ratio_preskip_to_lora": spread(seconds["preskip"], seconds["lora"]),
        "peak_bytes": memory,
        "memory_ratio": round(memory["preskip"] / memory["lora"], 3),
        "batch": [arguments.batch_size, arguments.seq_len],
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
