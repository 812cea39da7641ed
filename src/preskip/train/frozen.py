"""The frozen probe: train only the inserted weights with Hugging Face `Trainer`, on the same batches for every arm."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from preskip.errors import PreskipError
from preskip.progress import Advance, no_progress
from preskip.runs.files import clear_disk_errors, write_jsonl
from preskip.train.checkpoints import ResumableTrainer
from preskip.train.controls import EqualStep, train_on_noise
from preskip.train.distributed import adapt_trainer, is_main, share_batch, shared_training, uses_fsdp
from preskip.train.settings import MAX_GRAD_NORM, SCHEDULE, WEIGHT_DECAY, TrainingSettings
from preskip.train.steps import BlockDataset, finite_step, stack_rows

# The newest checkpoint, and one to fall back on where that is damaged.
KEPT_CHECKPOINTS = 2


class _StepLog(TrainerCallback):
    """Writes train.jsonl, stops at the first loss or gradient that is not finite, and keeps the steps equal."""

    def __init__(
        self, path: Path, tokens_per_step: int, arm: str, advance: Advance, equal_step: EqualStep | None
    ) -> None:
        self.path, self.tokens, self.arm, self.advance = path, tokens_per_step, arm, advance
        self.equal_step = equal_step
        self.rows: list[dict[str, Any]] = []
        self.started = time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.rows = [logged["row"] for logged in state.log_history if "row" in logged]

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.equal_step is not None:
            self.equal_step.before_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.equal_step is not None:
            self.equal_step.after_step()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs or state.global_step == 0:
            return
        loss, norm = finite_step(logs, state.global_step, self.arm, "lower --lr or use --dtype float32")
        row = {
            "step": state.global_step,
            "loss": loss,
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": norm,
            "tokens": self.tokens,
            "seconds": round(time.perf_counter() - self.started, 4),
        }
        if self.equal_step is not None:
            row["step_ratio"] = dict(self.equal_step.ratios)
        self.rows.append(row)
        state.log_history[-1]["row"] = row  # the checkpoint keeps it: the log cannot run ahead of the weights
        self.advance(state.global_step, f"loss {loss:.3f}")

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_jsonl(self.path, self.rows)


def train_frozen(
    model: nn.Module,
    blocks: np.ndarray,
    settings: TrainingSettings,
    *,
    arm: str,
    checkpoints: Path,
    log: Path,
    advance: Advance = no_progress,
) -> list[dict[str, Any]]:
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

    Returns:
        The rows of the training log, one per optimiser step. With `equal_step` they hold step_ratio, the common
        ‖ΔW‖ / ‖W‖ of each part. With control "noise" the loss is None, and nothing is kept for resuming: it starts
        anew, with the same result.

    Raises:
        PreskipError: nothing to train, a loss that is not finite, or a full disk.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PreskipError(f"arm {arm} has no trainable parameter")
    if settings.control == "noise":
        rows = train_on_noise(model, settings, advance=advance)
        write_jsonl(log, rows)
        return rows
    if settings.equal_step and uses_fsdp():
        raise PreskipError("equal steps need whole weights, which FSDP does not keep: train them with DDP")
    device = next(model.parameters()).device
    micro_batch, accumulation = share_batch(settings.batch_size, settings.micro_batch_size)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=settings.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULE,
        warmup_steps=settings.warmup_steps,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=settings.save_steps,
        save_total_limit=KEPT_CHECKPOINTS,
        seed=settings.seed,
        data_seed=settings.seed,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,  # what an arm trains takes part in every step
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
    )
    if settings.gradient_checkpointing:
        model.enable_input_require_grads()  # type: ignore[operator]
    equal_step = EqualStep(model) if settings.equal_step else None
    steps = _StepLog(log, settings.batch_size * blocks.shape[1], arm, advance, equal_step)
    length = settings.steps * settings.batch_size
    dataset = BlockDataset(blocks, length, settings.seed, shuffled=settings.control == "shuffled")
    with shared_training(model) as trained:
        trainer = ResumableTrainer(
            model=trained, args=arguments, train_dataset=dataset, data_collator=stack_rows, callbacks=[steps]
        )
        trainer.remove_callback(PrinterCallback)
        adapt_trainer(trainer)
        with clear_disk_errors(checkpoints):
            trainer.train(resume_from_checkpoint=True)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_disable()  # type: ignore[operator]
    if is_main():
        write_jsonl(log, steps.rows)
    return steps.rows
