"""What `preskip pretrain` costs beside a plain Trainer loop, and the branch beside what its FLOPs explain.

    python benchmarks/pretrain_throughput.py --arch llama-10m --rounds 5 --out throughput.json

Three trainings, interleaved, in one process: `plain` is transformers' own class under transformers' own `Trainer` with
its default AdamW; `base` is the same architecture and `preskip` the one with branches, both through `train_scratch`, as
a cell of `preskip pretrain` runs them. Each round trains all three for a few steps in turn; what counts is the ratio
within a round, so that what else the machine does at the time falls on all of them. Two clocks: wall time, and the
processor time of this process, which other processes disturb less. On a GPU processor time means nothing.

Two questions: is base / plain within 5 % of 1, and is preskip / base within 3 % of the ratio of their FLOPs (matrix
products; `forward_flops_per_token`)?
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import default_collate
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from preskip.architecture.shapes import shape_config
from preskip.arms.flops import forward_flops_per_token
from preskip.branch import BranchSettings
from preskip.runs.environment import describe, resolve_device
from preskip.runs.files import write_json
from preskip.train import scratch
from preskip.train.speed import measured_peak
from preskip.train.steps import BlockDataset

WARM_UP = 2


class Clock(TrainerCallback):
    """Seconds of every step by both clocks, from one step's begin to the next one's."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[tuple[float, float]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        """Read both clocks."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time()))

    def per_step(self) -> tuple[float, float]:
        """Median over the steps after the first two."""
        steps = np.diff(np.array(self.marks), axis=0)[WARM_UP:]
        return float(np.median(steps[:, 0])), float(np.median(steps[:, 1]))


def plain_trainer(model, blocks, options, clock: Clock) -> None:
    """Transformers' own loop, with nothing of ours in it."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.micro_batch_size,
            gradient_accumulation_steps=options.batch_size // options.micro_batch_size,
            learning_rate=1e-3,
            optim="adamw_torch_fused",
            bf16=options.dtype == "bfloat16",
            logging_steps=1,
            save_strategy="no",
            use_cpu=options.device == "cpu",
            dataloader_pin_memory=options.device == "cuda",
            disable_tqdm=True,
            report_to=[],
        )
        data = BlockDataset(blocks, options.steps * options.batch_size, 1)
        trainer = Trainer(
            model=model, args=arguments, train_dataset=data, data_collator=default_collate, callbacks=[clock]
        )
        trainer.train()


def ours(model, blocks, options, clock: Clock) -> None:
    """As a cell of `preskip pretrain` trains."""
    settings = scratch.ScratchSettings(
        steps=options.steps,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        learning_rate=1e-3,
        warmup_steps=1,
        seed=1,
        dtype=options.dtype,
        save_steps=10 * options.steps,
        peak_flops=1e12,
    )
    before = scratch._tensorboard
    scratch._tensorboard = lambda *_: [clock]  # the one place where callbacks come in
    try:
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            scratch.train_scratch(
                model, blocks, settings, arm="bench", checkpoints=folder / "checkpoints", log=folder / "train.jsonl"
            )
    finally:
        scratch._tensorboard = before


def main() -> None:
    """Run all rounds and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="llama-10m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.device = resolve_device(options.device)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    branch = BranchSettings(init_weights="paper")
    configs = {
        "plain": shape_config(options.arch, branch=None),
        "base": shape_config(options.arch, branch=None),
        "preskip": shape_config(options.arch, branch=branch),
    }
    vocabulary = configs["plain"].vocab_size
    blocks = np.random.default_rng(0).integers(0, vocabulary, (64, options.seq_len)).astype(np.uint16)
    flops, rounds = {}, []
    for number in range(options.rounds):
        found = {}
        # Turned round every time, so that nobody always comes first.
        for kind in list(configs)[:: 1 if number % 2 == 0 else -1]:
            set_seed(number)
            model = AutoModelForCausalLM.from_config(configs[kind], dtype=torch.float32).to(options.device)
            flops[kind] = forward_flops_per_token(model, options.seq_len)
            clock = Clock(options.device)
            (plain_trainer if kind == "plain" else ours)(model, blocks, options, clock)
            found[kind] = dict(zip(("wall", "processor"), clock.per_step(), strict=True))
        rounds.append(found)
        print(json.dumps(found), flush=True)
    expected = flops["preskip"] / flops["base"]
    tokens = options.batch_size * options.seq_len
    result = {
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "environment": describe(options.device),
        "peak_flops": measured_peak(options.device, getattr(torch, options.dtype)),
        "forward_flops_per_token": flops,
        "rounds": rounds,
        "tokens_per_second": {
            kind: round(tokens / statistics.median(row[kind]["wall"] for row in rounds), 1) for kind in configs
        },
        "preskip_to_base_by_flops": round(expected, 4),
    }
    for clock_name in ("wall", "processor"):
        for above, below in (("base", "plain"), ("preskip", "base")):
            ratios = sorted(row[above][clock_name] / row[below][clock_name] for row in rounds)
            result[f"{above}_to_{below}_{clock_name}"] = {
                "median": round(statistics.median(ratios), 4),
                "low": round(ratios[0], 4),
                "high": round(ratios[-1], 4),
            }
    if options.out:
        write_json(options.out, result)
    print(json.dumps({key: value for key, value in result.items() if key not in ("environment", "rounds")}))


if __name__ == "__main__":
    main()
