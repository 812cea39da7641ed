"""A penalty on what an arm changes out of domain: the divergence of its output distribution from the base's.

What is minimised, on batches of in-domain text to which some sequences of other text are added::

    L = NLL(in-domain) + W · KL       KL = mean over positions of  Σ_v p(v) · (log p(v) − log q(v))   [nats per token]

p is the base's distribution of the next token, q the arm's: the direction that asks the arm to keep likely what the
base holds likely. The base is the same model with everything that the arm has inserted switched off and every weight
that it trains in place put back, computed anew for every sequence and without gradients, so nothing is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn
from torch.nn import functional as F

from preskip.forwards import evaluating
from preskip.train.checkpoints import ResumableTrainer
from preskip.train.steps import BlockDataset

# Every how many-th sequence of training brings one of the other text, so that a step reads a quarter more.
EVERY = 4


@dataclass(kw_only=True)
class Keep:
    """What to keep, and how much it counts.

    Args:
        weight: W, above 0.
        blocks: the other text, int array [N, seq_len], whole blocks without padding.
        as_base: while its context lasts, the model computes as the untouched base.
    """

    weight: float
    blocks: np.ndarray
    as_base: Callable[[], AbstractContextManager[None]]
    _sums: list[torch.Tensor] = field(default_factory=list)  # of this process since the last row of the log
    _tokens: int = 0

    def add(self, total: torch.Tensor, tokens: int) -> None:
        """Note a divergence summed over so many tokens."""
        self._sums.append(total.detach().double())
        self._tokens += tokens

    def mean(self) -> float:
        """KL in nats per token since the last call, over all processes, which must all call it."""
        none = torch.zeros((), dtype=torch.double, device=PartialState().device)  # of a process without such a row
        sums = torch.stack(self._sums).sum() if self._sums else none
        both = torch.stack((sums, sums.new_tensor(self._tokens)))
        self._sums, self._tokens = [], 0
        total, tokens = reduce(both, "sum").tolist()
        return total / tokens if tokens else 0.0


def kept_per_step(batch_size: int) -> int:
    """How many sequences of an optimiser step bring one of the other text: each fourth, the first among them."""
    return -(-batch_size // EVERY)


class KeepDataset(BlockDataset):
    """As `BlockDataset`; a row has `kept_ids` [T] too, −1 throughout where it brings no other text.

    Args:
        blocks, length, seed, shuffled: see `BlockDataset`.
        other: blocks of the other text, as long as those of training.
        batch_size: sequences per optimiser step.
    """

    def __init__(self, *args: Any, other: np.ndarray, batch_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batch_size, self.kept = batch_size, kept_per_step(batch_size)
        self.other = BlockDataset(other, -(-len(self) // batch_size) * self.kept, self.seed)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        step, place = divmod(index, self.batch_size)
        number, odd = divmod(place, EVERY)
        kept = torch.full_like(row["input_ids"], -1) if odd else self.other[step * self.kept + number]["input_ids"]
        return {**row, "kept_ids": kept}


class KeepTrainer(ResumableTrainer):
    """Adds W · KL to the gradient; the loss that is logged stays the language model's."""

    def __init__(self, *args: Any, keep: Keep, batch_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep, self.rows_per_step = keep, kept_per_step(batch_size)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As `ResumableTrainer.compute_loss`, in one pass over in-domain rows and those of the other text."""
        inputs = dict(inputs)
        kept = inputs.pop("kept_ids")
        kept = kept[kept[:, 0] >= 0]
        if not len(kept):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Before the arm's own pass: recomputation in the backward pass asks for what that pass left behind.
        wanted = self._of_base(model, kept)
        count = len(inputs["input_ids"])
        inputs["input_ids"] = torch.cat((inputs["input_ids"], kept))
        inputs["labels"] = torch.cat((inputs["labels"], torch.full_like(kept, -100)))
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        total = divergence(wanted, outputs.logits[count:])
        self.keep.add(total, kept[:, 1:].numel())
        # The same whatever the micro-batches: the mean over the tokens of a step, of all its passes and processes.
        scale = self.keep.weight * self.accelerator.num_processes / (self.rows_per_step * (kept.shape[1] - 1))
        if not (self.model_accepts_loss_kwargs and num_items_in_batch is not None):
            scale *= self.current_gradient_accumulation_steps  # Trainer divides by it
        penalty = scale * total
        loss = loss + (penalty - penalty.detach())
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _of_base(self, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """The base's logits [K, T, V], without dropout."""
        own: Any = self.accelerator.unwrap_model(model)
        try:
            with evaluating(own), self.keep.as_base():
                return own(input_ids=ids, use_cache=False).logits
        finally:
            torch.clear_autocast_cache()  # it holds casts of weights without gradients, and of the base's own


def divergence(base_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(base ‖ arm) of the next token in nats, summed over rows and all positions [K, T, V] but the last, in fp32."""
    base, own = (F.log_softmax(given[:, :-1].float(), dim=-1) for given in (base_logits, logits))
    return F.kl_div(own, base, reduction="sum", log_target=True)
