"""What training a frozen model and training from scratch share: the order of blocks, the log, Trainer's arguments."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import patch_environment
from torch import nn
from torch.utils.data import Dataset, default_collate
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from preskip.errors import DivergedError
from preskip.progress import Advance
from preskip.runs.files import clear_disk_errors, write_jsonl
from preskip.runs.schema import StepRow
from preskip.train.checkpoints import ResumableTrainer
from preskip.train.controls import shuffle_targets
from preskip.train.distributed import adapt_trainer, is_main, share_batch, shared_training
from preskip.train.settings import Settings


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


class StepLog(TrainerCallback):
    """The rows of train.jsonl, in the checkpoints too; stops at the first loss or gradient that is not finite.

    Args:
        arm: name for messages.
        tokens_per_step: tokens of an optimiser step.
        advance: progress, called as advance(step, note).
    """

    advice = "lower --lr or use --dtype float32"
    # Whether a row's seconds count from the row before it, with what the loader takes between two steps.
    counts_loading = False

    def __init__(self, arm: str, tokens_per_step: int, advance: Advance) -> None:
        self.arm, self.tokens_per_step, self.advance = arm, tokens_per_step, advance
        self.rows: list[StepRow] = []
        self.last_step = self.first_step = 0
        self.mark: float | None = None  # when the steps of the next row began

    def on_train_begin(self, args, state, control, **kwargs):
        """Take back the rows that a checkpoint kept."""
        self.rows = [entry["row"] for entry in state.log_history if "row" in entry]
        self.last_step = self.rows[-1]["step"] if self.rows else 0
        self.first_step = state.global_step

    def on_step_begin(self, args, state, control, **kwargs):
        """Begin to count a row's seconds."""
        self.mark = time.perf_counter() if self.mark is None else self.mark

    def on_step_end(self, args, state, control, **kwargs):
        """Log the last step, too."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add a row."""
        if not logs or "loss" not in logs or state.global_step == self.last_step or self.mark is None:
            return
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm") or 0.0)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise DivergedError(
                f"arm {self.arm}: the loss is {loss} and the gradient norm {norm} at step {state.global_step}: "
                f"{self.advice}"
            )
        now = time.perf_counter()
        steps = state.global_step - self.last_step
        # Of a row's steps before a resume the time is lost: they took as long as those after it.
        seconds = (now - self.mark) * steps / (state.global_step - max(self.last_step, self.first_step))
        row: StepRow = {
            "step": state.global_step,
            "loss": loss,
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": norm,
            "tokens": steps * self.tokens_per_step,
            "seconds": round(seconds, 4),
        }
        note = f"loss {loss:.3f}{self.complete(row, seconds, logs)}"
        self.rows.append(row)
        state.log_history[-1]["row"] = row  # the checkpoint keeps it: the log cannot run ahead of the weights
        self.last_step, self.mark = state.global_step, now if self.counts_loading else None
        self.advance(state.global_step, note)

    def complete(self, row: StepRow, seconds: float, logs: dict[str, Any]) -> str:
        """Add what this kind of training logs besides; gives what to show of it."""
        return ""


def fit(
    model: nn.Module,
    settings: Settings,
    steps: StepLog,
    dataset: BlockDataset,
    *,
    checkpoints: Path,
    log: Path,
    trainer: Callable[..., ResumableTrainer] = ResumableTrainer,
    callbacks: Sequence[TrainerCallback] = (),
    evaluation: Dataset | None = None,
    **arguments: Any,
) -> list[StepRow]:
    """Train with Hugging Face `Trainer`, from the last whole checkpoint where there is one, and write the log.

    Trained are the parameters that require gradients; `log` is train.jsonl, `checkpoints` the trainer's folder, and
    `arguments` are `TrainingArguments` beyond those that every training has.

    Raises:
        PreskipError: a loss that is not finite, a batch that cannot be shared out, or a full disk.
    """
    device = next(model.parameters()).device
    micro_batch, accumulation = share_batch(settings.batch_size, settings.micro_batch_size)
    with patch_environment(accelerate_mixed_precision="no"):  # --dtype decides, not the launcher
        options = TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=settings.steps,
            per_device_train_batch_size=micro_batch,
            per_device_eval_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            learning_rate=settings.learning_rate,
            train_sampling_strategy="sequential",
            logging_nan_inf_filter=False,
            save_steps=settings.save_steps,
            save_total_limit=settings.keep_checkpoints,
            seed=settings.seed,
            data_seed=settings.seed,
            gradient_checkpointing=settings.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            remove_unused_columns=False,
            disable_tqdm=True,
            **arguments,
        )
    if options.n_gpu > 1:
        options._n_gpu = 1  # without a launcher Trainer would multiply the batch by the machine's GPUs
    with shared_training(model) as trained:
        worker = trainer(
            model=trained,
            args=options,
            train_dataset=dataset,
            eval_dataset=evaluation,
            data_collator=default_collate,
            callbacks=[steps, *callbacks],
        )
        worker.remove_callback(PrinterCallback)
        adapt_trainer(worker)
        with clear_disk_errors(checkpoints):
            worker.train(resume_from_checkpoint=True)
    if is_main():
        write_jsonl(log, steps.rows)
    return steps.rows
