"""A branch that computes in bfloat16 against one in float32, beside the same bfloat16 base.

    python benchmarks/branch_dtype.py [--model smollm2] [--seeds 1,2,3] [--steps 50] [--batch-size 2] [--seq-len 64]

Both trainings of a seed begin with the same weights and read the same batches; weights and gradients are float32 in
both, only the products differ. Compared are the mean training loss of the last steps and bits per byte of held-out
documents, each against the spread between seeds. Beside them the share of the weights that a few steps at a small rate
move. Ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from preskip import BranchSettings
from preskip.arms import ARMS, ArmContext, attention_paths, branch_parameters
from preskip.arms.insert import insert
from preskip.assets import load_model, load_tokenizer
from preskip.data.blocks import pack_blocks
from preskip.data.splits import choose, load_splits
from preskip.evaluate.texts import prepare_texts, score_texts
from preskip.stats import compare
from preskip.train.frozen import train_frozen
from preskip.train.settings import TrainingSettings

SMALL_RATE = 1e-5
DESIGN = ("steps", "batch_size", "seq_len", "learning_rate", "documents", "words")
# Steps whose losses make one mean.
WINDOW = 10


@contextmanager
def float32_products() -> Iterator[None]:
    """Branches compute in the dtype of their weights, whatever the activations are."""
    with mock.patch("preskip.branch.product", lambda x, linear: linear(x.to(linear.weight.dtype))):
        yield


class Study:
    """The base, and what is trained and scored."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.base = load_model(given.model, dtype=torch.bfloat16)
        tokenizer = load_tokenizer(given.model)
        splits = load_splits(given.corpus)
        documents = choose(splits.heldout, given.documents, given.words, 0)
        self.text = prepare_texts("held-out", documents, tokenizer, context_length=256)
        self.tokenizer = tokenizer
        wanted = given.steps * given.batch_size * given.seq_len
        self.blocks = {
            seed: pack_blocks(splits.training, tokenizer, given.seq_len, limit_tokens=wanted, seed=seed,
                              piece_characters=4000, min_blocks=given.batch_size)
            for seed in given.seeds
        }  # fmt: skip
        targets = attention_paths(self.base)
        self.context = ArmContext(
            base=self.base,
            settings=BranchSettings(),
            skip_position="attention",
            layers=None,
            targets=tuple(targets),
            budget=branch_parameters(self.base, BranchSettings(), targets),
        )

    def train(self, model: torch.nn.Module, seed: int, steps: int, rate: float) -> list[float]:
        """The losses of a training."""
        given = self.given
        settings = TrainingSettings(
            steps=steps,
            batch_size=given.batch_size,
            micro_batch_size=given.batch_size,
            learning_rate=rate,
            seed=seed,
            save_steps=steps,
        )
        with tempfile.TemporaryDirectory() as folder:
            where = {"checkpoints": Path(folder) / "checkpoints", "log": Path(folder) / "train.jsonl"}
            rows = train_frozen(model, self.blocks[seed], settings, arm="preskip", **where)
        return [row["loss"] for row in rows]

    def outcome(self, seed: int, products: Any) -> tuple[list[float], list[Any]]:
        """The losses of a training, and the records of the held-out documents after it."""
        with insert(ARMS["preskip"], self.context, seed) as inserted, products:
            losses = self.train(inserted.model, seed, self.given.steps, self.given.learning_rate)
            return losses, score_texts(inserted.model.eval(), [self.text], self.tokenizer)

    def moved(self, seed: int, steps: int = 4) -> float:
        """Share of the weights that some steps at a small rate change."""
        with insert(ARMS["preskip"], self.context, seed) as inserted:
            before = {name: weight.detach().clone() for name, weight in inserted.trainable.items()}
            self.train(inserted.model, seed, steps, SMALL_RATE)
            changed = sum(int((weight != before[name]).sum()) for name, weight in inserted.trainable.items())
            return changed / inserted.parameters


def summary(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """What both come to by seed, their paired differences, and the spread between seeds that these are held against."""
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    spread = statistics.stdev(ours)
    return {
        "bfloat16": ours,
        "float32": theirs,
        "differences": differences,
        "mean_difference": statistics.mean(differences),
        "deviation_between_seeds": spread,
        "within": all(abs(difference) <= spread for difference in differences),
    }


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Train, score and compare."""
    study = Study(given)
    losses: dict[str, dict[int, list[float]]] = {"bfloat16": {}, "float32": {}}
    items: dict[str, dict[int, list[Any]]] = {"bfloat16": {}, "float32": {}}
    for seed in given.seeds:
        for kind, products in (("bfloat16", nullcontext()), ("float32", float32_products())):
            losses[kind][seed], items[kind][seed] = study.outcome(seed, products)
            print(f"seed {seed}, {kind}: loss {np.mean(losses[kind][seed][-WINDOW:]):.4f}", flush=True)
    scores = {kind: [_bits_per_byte(records) for records in found.values()] for kind, found in items.items()}
    ends = {kind: [float(np.mean(rows[-WINDOW:])) for rows in found.values()] for kind, found in losses.items()}
    [entry] = compare(items["bfloat16"], items["float32"], arm="bfloat16", reference="float32")
    steps = np.array([losses["bfloat16"][seed] for seed in given.seeds]) - [losses["float32"][s] for s in given.seeds]
    return {
        "model": given.model,
        "corpus": given.corpus,
        "design": {name: getattr(given, name) for name in DESIGN},
        "seeds": given.seeds,
        "threads": torch.get_num_threads(),
        "loss_of_last_steps": summary(ends["bfloat16"], ends["float32"]),
        "largest_difference_of_a_step": float(np.abs(steps).max()),
        "bits_per_byte": summary(scores["bfloat16"], scores["float32"]),
        "interval": {key: entry[key] for key in ("difference", "low", "high", "covers", "units", "seeds")},
        "moved_share": {"learning_rate": SMALL_RATE, "steps": 4, "share": study.moved(given.seeds[0])},
    }


def _bits_per_byte(records: list[Any]) -> float:
    return sum(row["nll"] for row in records) / sum(row["bytes"] for row in records) / float(np.log(2))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--corpus", default="sotu")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=ARMS["preskip"].learning_rate)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--words", type=int, default=80)
    given = parser.parse_args()
    if len(given.seeds) < 2:
        parser.error("--seeds needs two or more: the spread between them is what differences are held against")
    print(json.dumps(measure(given)))


if __name__ == "__main__":
    main()
