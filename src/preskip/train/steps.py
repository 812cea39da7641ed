"""What training a frozen model and training from scratch share: the order of blocks, batches, the check of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from preskip.errors import DivergedError
from preskip.train.controls import shuffle_targets


class BlockDataset(Dataset):
    """Packed blocks [N, seq_len] in training order: item i is what the i-th sequence of training sees.

    Args:
        blocks: int array [N, seq_len]; -100 marks padding at a block's end.
        length: number of sequences of the whole training; each pass over the blocks has its own permutation.
        seed: of the permutations.
        shuffled: give the targets in random order (`preskip.train.controls.shuffle_targets`).
    """

    def __init__(self, blocks: np.ndarray, length: int, seed: int, *, shuffled: bool = False) -> None:
        generator = np.random.default_rng(seed)
        passes = -(-length // len(blocks))
        self.order = np.concatenate([generator.permutation(len(blocks)) for _ in range(passes)])[:length]
        self.blocks, self.seed, self.shuffled = blocks, seed, shuffled

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.blocks[self.order[index]].astype(np.int64))
        labels = shuffle_targets(ids, self.seed, index) if self.shuffled else ids
        # Padding of the paper's paragraphs is marked by -100: not trained on; behind all text, so never attended to.
        return {"input_ids": ids.clamp(min=0), "labels": labels}


def stack_rows(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of sequences of one length, [B, T] by key."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def finite_step(logs: Mapping[str, Any], step: int, arm: str, advice: str) -> tuple[float, float]:
    """Loss (nats per token) and gradient norm of a step as Trainer logs them.

    Args:
        logs: of Trainer.
        step: the optimiser step.
        arm: name for the message.
        advice: what to do where they are not finite.

    Raises:
        DivergedError: one of them is not finite.
    """
    loss, norm = float(logs["loss"]), float(logs.get("grad_norm") or 0.0)
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise DivergedError(
            f"arm {arm}: the loss is {loss} and the gradient norm {norm} at step {step}: {advice}; the last good "
            "checkpoint is kept"
        )
    return loss, norm
