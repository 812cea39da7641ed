"""What it saves to compute frozen first layers once: steps of late arms against the step of `preskip` on all layers.

Every arm stands on its own copy of the same base and trains the same batch in turn, with and without reuse, so that a
change of the machine's speed meets all alike. What is owed beside it: the products of a step, forward and backward, as
torch counts them. Reuse leaves an arm the layers behind its first trained one, and the output head, whose products are
those of 21 % of SmolLM2's weights: "head" is its share of the step of `preskip`.

    python benchmarks/prefix_reuse.py [--model smollm2] [--arms preskip-late,preskip-late-narrow] [--rounds 8]

Losses and gradients with reuse are those without, to the bit, or it ends with an error. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from train_step import Stepper

from preskip.adapter import base_model
from preskip.train.kept_states import KeptStates
from preskip.train.prefix import FrozenPrefix, Passes

FULL = "preskip"
REUSED = " reused"


class LateStepper(Stepper):
    """Steps of one arm that can reuse its first layers."""

    def __init__(self, name: str, arguments: argparse.Namespace, folder: Path) -> None:
        super().__init__(name, arguments)
        self.name = name
        self.prefix = FrozenPrefix(base_model(self.model), name)
        self.kept = KeptStates(folder / name)
        self.layers = self.prefix.untrained_layers(self.model)

    @contextmanager
    def reusing(self, on: bool) -> Iterator[Passes | None]:
        """Reuse while the context lasts."""
        with self.prefix.reused(self.kept, training=self.layers) if on else nullcontext() as passes:
            yield passes

    def bits(self) -> list[torch.Tensor]:
        """Loss and gradients of a step that is not made."""
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        found = [loss.detach(), *(p.grad.clone() for p in self.model.parameters() if p.grad is not None)]
        self.optimizer.zero_grad()
        return found

    def flops(self) -> int:
        """Of a step's products."""
        with FlopCounterMode(display=False) as counter:
            self.bits()
        return counter.get_total_flops()


def check_bits(stepper: LateStepper) -> None:
    """End where a loss or gradient with reuse is another than without."""
    plain = stepper.bits()
    with stepper.reusing(True) as passes:
        stepper.bits()  # keeps the states
        again = stepper.bits()
    if passes is None or passes.reused != 1 or not all(map(torch.equal, plain, again)):
        raise SystemExit(f"{stepper.name}: a step with reuse is not that without")


def summary(values: np.ndarray) -> dict[str, float]:
    """Median and range."""
    names = {"median": np.median(values), "min": values.min(), "max": values.max()}
    return {name: round(float(value), 3) for name, value in names.items()}


def measured(late: list[LateStepper], full: LateStepper, arguments: argparse.Namespace) -> dict:
    """Times of all steps, and what they owe."""
    for stepper in late:
        check_bits(stepper)
    ways = {FULL: (full, False)}
    for stepper in late:
        ways |= {stepper.name: (stepper, False), stepper.name + REUSED: (stepper, True)}
    flops: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1, arguments.rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            stepper, on = ways[name]
            with stepper.reusing(on):
                if number < 0:  # warm, and counted
                    flops[name] = stepper.flops()
                    stepper.step()
                else:
                    seconds[name].append(stepper.step())
    base = full.model.config.get_text_config()
    head = 4 * arguments.batch_size * arguments.seq_len * base.hidden_size * base.vocab_size
    return {
        "model": arguments.model,
        "first_layers": {stepper.name: stepper.layers for stepper in late},
        "parameters": {stepper.name: stepper.parameters for stepper in (full, *late)},
        "median_seconds": {name: round(float(np.median(values)), 3) for name, values in seconds.items()},
        f"ratio_to_{FULL}": {
            name: summary(np.array(values) / np.array(seconds[FULL]))
            for name, values in seconds.items()
            if name != FULL
        },
        "owed_by_products": {name: round(count / flops[FULL], 3) for name, count in flops.items() if name != FULL},
        "head": round(head / flops[FULL], 3),
        "batch": [arguments.batch_size, arguments.seq_len],
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--arms", default="preskip-late,preskip-late-narrow")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        late = [LateStepper(name, arguments, Path(folder)) for name in arguments.arms.split(",")]
        print(json.dumps(measured(late, LateStepper(FULL, arguments, Path(folder)), arguments)))


if __name__ == "__main__":
    main()
