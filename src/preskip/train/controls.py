"""Controls that show what the depth picture owes to the optimiser: noise gradients, shuffled targets, equal steps.

* noise: the same optimiser, schedule, clipping and shapes, on gradients ~ N(0, 1). What the weights' norms look like
  when nothing is learned.
* shuffled targets: real text, but the tokens to predict come in random order within each sequence. The frequencies of
  tokens stay, and which tokens a text is made of; their order is gone.
* equal steps: after every optimiser step the updates are rescaled so that ‖ΔW‖ / ‖W‖ is the same in all layers, a
  control proposed by Billa, "Decomposing the Depth Profile of Fine-Tuning" (arXiv 2604.17177). What common ratio that
  paper takes and what it does at W = 0 is not told in its abstract; `EqualStep` states our choice.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict

import numpy as np
import torch
from torch import nn

from preskip.progress import Advance, no_progress
from preskip.runs.schema import StepRow
from preskip.train.settings import CONTROLS, MAX_GRAD_NORM, SCHEDULE, WEIGHT_DECAY, TrainingSettings


def shuffle_targets(ids: torch.Tensor, seed: int, index: int) -> torch.Tensor:
    """Labels [T] of a sequence `ids` [T] in random order; the first, which is never predicted, and padding stay.

    Args:
        ids: token ids of one sequence; negative ones, at its end, are padding.
        seed: of the training.
        index: place of the sequence in the training order, so that each visit draws its own order.
    """
    length = int((ids >= 0).sum())
    order = np.random.default_rng([seed, index]).permutation(max(0, length - 1)) + 1
    return torch.cat([ids[:1], ids[torch.from_numpy(order)], ids[max(1, length) :]])


class EqualStep:
    """Rescales each layer's update so that ‖ΔW‖ / ‖W‖ is the same in all layers, per part of the branch.

    Layers are compared within one part (all W_up, all W_down, ...): tensors whose paths differ in the block's index
    alone. The common ratio is the mean over the layers of the ratios that the optimiser proposed, so the training as a
    whole moves as far as before. ‖W‖ is taken before the step. While some tensor of a part is still 0, as W_down and
    W_skip are at the first step of an identity initialisation, ‖ΔW‖ itself is equalised: its limit for equal, small
    ‖W‖. A layer whose update is exactly 0 has no direction to rescale; it stays, and does not enter the mean.

    The optimiser's own state is not touched and nothing is kept from one step to the next, so a resumed training is
    the uninterrupted one.

    Args:
        model: its trainable parameters are controlled.

    Attributes:
        ratios: the common ratio of each part at the last step (‖ΔW‖ where the part was still 0).
    """

    def __init__(self, model: nn.Module) -> None:
        self.groups: dict[str, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.groups[_part(name)].append(parameter)
        self.ratios: dict[str, float] = {}
        self._before: dict[str, list[torch.Tensor]] = {}

    @torch.no_grad()
    def before_step(self) -> None:
        """Remember the weights; call it just before the optimiser's step."""
        self._before = {part: [p.clone() for p in parameters] for part, parameters in self.groups.items()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Rescale the updates since `before_step`."""
        for part, parameters in self.groups.items():
            before = self._before[part]
            updates = [p - old for p, old in zip(parameters, before, strict=True)]
            lengths = torch.stack([update.norm() for update in updates])  # [layers]
            sizes = torch.stack([old.norm() for old in before])
            if (sizes == 0).any():
                sizes = torch.ones_like(sizes)
            moving = lengths > 0
            ratio = (lengths / sizes)[moving].mean() if moving.any() else torch.zeros(())
            self.ratios[part] = ratio.item()
            scales = ratio * sizes / lengths.where(moving, torch.ones_like(lengths))
            for p, old, update, scale in zip(parameters, before, updates, scales, strict=True):
                p.copy_(old + scale * update)
        self._before = {}


def _part(name: str) -> str:
    """The path of a parameter without what tells one block from another: its index, the first number in the path."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def noise_seed(seed: int) -> int:
    """Seed of the noise: another stream than the weights' initialisation, which has the training's seed itself.

    The same stream would hand the initial weights out again as gradients: the updates then point against the weights.
    """
    return int(np.random.SeedSequence([seed, CONTROLS.index("noise")]).generate_state(1)[0])


def train_on_noise(model: nn.Module, settings: TrainingSettings, *, advance: Advance = no_progress) -> list[StepRow]:
    """Train on gradients ~ N(0, 1) in place of the loss's: no text, no forward and no backward pass.

    AdamW, clipping and schedule are those of `train_frozen`; AdamW does not see the gradient's scale, so the noise's
    standard deviation does not matter. The loop is the trainer's own, step for step (a test holds one against the
    other), and it is so cheap that it keeps no checkpoints.

    Args:
        model: its trainable parameters are trained.
        settings: steps, learning rate, seed and equal_step count; batch sizes do not.
        advance: progress, called as advance(step, note).

    Returns:
        Rows as of `train_frozen`, with loss None and no tokens.
    """
    from transformers import get_scheduler

    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    generator = torch.Generator(device).manual_seed(noise_seed(settings.seed))
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=WEIGHT_DECAY)
    schedule = get_scheduler(
        SCHEDULE, optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=settings.steps
    )
    equal_step = EqualStep(model) if settings.equal_step else None
    rows: list[StepRow] = []
    for step in range(1, settings.steps + 1):
        started = time.perf_counter()
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, device=device, dtype=p.dtype)
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        if equal_step is not None:
            equal_step.before_step()
        optimizer.step()
        if equal_step is not None:
            equal_step.after_step()
        row: StepRow = {
            "step": step,
            "loss": None,
            "learning_rate": schedule.get_last_lr()[0],
            "grad_norm": norm.item(),
            "tokens": 0,
            "seconds": round(time.perf_counter() - started, 4),
        }
        if equal_step is not None:
            row["step_ratio"] = dict(equal_step.ratios)
        rows.append(row)
        schedule.step()
        advance(step, "noise")
    optimizer.zero_grad()
    return rows
