"""The frozen probe: train only the inserted weights with Hugging Face `Trainer`, on the same batches for every arm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from preskip.errors import PreskipError
from preskip.progress import Advance, no_progress
from preskip.runs.files import write_jsonl
from preskip.runs.schema import StepRow
from preskip.train.checkpoints import ResumableTrainer
from preskip.train.controls import EqualStep, train_on_noise
from preskip.train.distributed import uses_fsdp
from preskip.train.keep import Keep, KeepDataset, KeepTrainer
from preskip.train.settings import MAX_GRAD_NORM, SCHEDULE, WEIGHT_DECAY, TrainingSettings
from preskip.train.steps import BlockDataset, StepLog, fit


class _StepLog(StepLog):
    """Writes train.jsonl with each checkpoint, and keeps the steps equal."""

    def __init__(self, path: Path, equal_step: EqualStep | None, keep: Keep | None, *args: Any) -> None:
        super().__init__(*args)
        self.path, self.equal_step, self.keep = path, equal_step, keep

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.equal_step is not None:
            self.equal_step.before_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.equal_step is not None:
            self.equal_step.after_step()

    def complete(self, row: StepRow, seconds: float, logs: dict[str, Any]) -> str:
        """See `StepLog`."""
        if self.equal_step is not None:
            row["step_ratio"] = dict(self.equal_step.ratios)
        if self.keep is not None:
            row["keep_kl"] = self.keep.mean()
        return ""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_jsonl(self.path, self.rows)


def check_sharding(*, equal_step: bool, keep: bool) -> None:
    """Refuse under FSDP what needs whole weights.

    Raises:
        PreskipError: equal steps, or a penalty on what is changed out of domain, and the launcher asks for FSDP.
    """
    if equal_step and uses_fsdp():
        raise PreskipError(
            "equal steps need whole weights, which FSDP does not keep: train with DDP, or give --no-equal-step"
        )
    if keep and uses_fsdp():
        raise PreskipError("--keep-weight needs the base's whole weights, which FSDP does not keep: train with DDP")


def train_frozen(
    model: nn.Module,
    blocks: np.ndarray,
    settings: TrainingSettings,
    *,
    arm: str,
    checkpoints: Path,
    log: Path,
    advance: Advance = no_progress,
    keep: Keep | None = None,
) -> list[StepRow]:
    """Train the parameters of `model` that require gradients; the rest stays frozen.

    An earlier, interrupted call with the same arguments is continued from its last good checkpoint, with the result of
    an uninterrupted one; see `preskip.train.checkpoints`.

    Args:
        model: a PEFT model.
        blocks: token blocks [N, seq_len].
        settings: how.
        arm: name for messages.
        checkpoints: folder for the trainer's checkpoints.
        log: train.jsonl.
        advance: progress, called as advance(step, note).
        keep: a penalty on what is changed out of domain, or None.

    Returns:
        The rows of the training log, one per optimiser step. With `equal_step` they hold step_ratio, the common
        ‖ΔW‖ / ‖W‖ of each part; with `keep` keep_kl, KL(base ‖ arm) in nats per token before the step. With control
        "noise" the loss is None, and nothing is kept for resuming: it starts anew, with the same result.

    Raises:
        PreskipError: nothing to train, a loss that is not finite, or a full disk.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PreskipError(f"arm {arm} has no trainable parameter")
    if settings.control == "noise":
        rows = train_on_noise(model, settings, advance=advance)
        write_jsonl(log, rows)
        return rows
    check_sharding(equal_step=settings.equal_step, keep=keep is not None)
    equal_step = EqualStep(model) if settings.equal_step else None
    length = settings.steps * settings.batch_size
    order: dict[str, Any] = {"length": length, "seed": settings.seed, "shuffled": settings.control == "shuffled"}
    dataset = BlockDataset(blocks, **order)
    trainer: Callable[..., ResumableTrainer] = ResumableTrainer
    if keep is not None:
        dataset = KeepDataset(blocks, **order, other=keep.blocks, batch_size=settings.batch_size)
        trainer = partial(KeepTrainer, keep=keep, batch_size=settings.batch_size)
    try:
        return fit(
            model,
            settings,
            _StepLog(log, equal_step, keep, arm, settings.batch_size * blocks.shape[1], advance),
            dataset,
            checkpoints=checkpoints,
            log=log,
            trainer=trainer,
            lr_scheduler_type=SCHEDULE,
            warmup_steps=settings.warmup_steps,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            optim="adamw_torch",
            logging_steps=1,
            ddp_find_unused_parameters=False,  # what an arm trains takes part in every step
            report_to=[],
        )
    finally:
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_disable()  # type: ignore[operator]
            model.disable_input_require_grads()  # type: ignore[operator]  # transformers' hook on the embedding
