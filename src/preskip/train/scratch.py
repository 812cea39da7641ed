"""Training from scratch with Hugging Face `Trainer`: packed blocks, cosine with warm-up, AdamW in groups, a log."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from preskip.arms.flops import training_flops_per_token
from preskip.attach import CHILD
from preskip.errors import DivergedError, PreskipError
from preskip.progress import Advance, no_progress
from preskip.runs.files import clear_disk_errors, write_jsonl
from preskip.train.checkpoints import ResumableTrainer
from preskip.train.distributed import adapt_trainer, is_main, share_batch, shared_training, world_size
from preskip.train.steps import BlockDataset, finite_step, stack_rows

SCHEDULE = "cosine_with_min_lr"


@dataclass(frozen=True, kw_only=True)
class ScratchSettings:
    """How a model is trained from scratch.

    Args:
        steps: optimiser steps.
        batch_size: sequences per optimiser step, over all processes.
        micro_batch_size: sequences per forward pass and process.
        learning_rate: peak; linear warm-up, then a cosine.
        warmup_steps: steps of the warm-up.
        final_rate: learning rate at the end, as a share of the peak. Default 0.1.
        weight_decay: of matrices; norms, biases and embeddings (and an output head tied to one) have none.
        beta2: AdamW's second decay. Default 0.95, usual where a language model is trained from scratch.
        max_grad_norm: the gradient is clipped to this norm.
        branch_rate_factor: learning rate of the branch's matrices over that of the rest.
        seed: of the data order and dropout.
        dtype: the forward pass computes in this: "float32" or "bfloat16" (autocast; weights and optimiser stay fp32).
        compile: `torch.compile` the model.
        gradient_checkpointing: recompute activations in the backward pass.
        log_steps: optimiser steps per line of the log.
        eval_steps: optimiser steps between two evaluations, a multiple of `log_steps`; None never evaluates.
        save_steps: optimiser steps between two checkpoints.
        keep_checkpoints: how many of the newest are kept while training; 2 or more, to have one to fall back on.
        report_to: experiment trackers of Trainer, e.g. ("tensorboard", "wandb").
        peak_flops: FLOPs per second of a process that utilisation is held against; None leaves it out.
    """

    steps: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    warmup_steps: int
    seed: int
    final_rate: float = 0.1
    weight_decay: float = 0.1
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    branch_rate_factor: float = 1.0
    dtype: str = "float32"
    compile: bool = False
    gradient_checkpointing: bool = False
    log_steps: int = 1
    eval_steps: int | None = None
    save_steps: int = 500
    keep_checkpoints: int = 2
    report_to: tuple[str, ...] = ()
    peak_flops: float | None = None


def parameter_groups(model: nn.Module, *, learning_rate: float, weight_decay: float, branch_rate_factor: float = 1.0):
    """AdamW's groups: with and without weight decay, of the branches and of the rest; empty ones are left out.

    Decayed are the matrices (two dimensions or more) of linear layers and experts, the branch's among them. Norms,
    biases, other vectors, and token and position embeddings are not, nor is an output head that is tied to one.

    Args:
        model: its trainable parameters are grouped.
        learning_rate: peak of all but the branches.
        weight_decay: of the matrices.
        branch_rate_factor: learning rate of the branches' matrices over `learning_rate`.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and id(parameter) not in embeddings
            groups.setdefault((f".{CHILD}." in name, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * (branch_rate_factor if in_branch else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (in_branch, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


class ScratchTrainer(ResumableTrainer):
    """Trainer with exact resume, with the optimiser's groups of `parameter_groups`.

    Args:
        branch_rate_factor: see `parameter_groups`.
    """

    def __init__(self, *args: Any, branch_rate_factor: float = 1.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.branch_rate_factor = branch_rate_factor

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimiser that the arguments name, with our groups."""
        trained: Any = self.model if model is None else model
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = parameter_groups(
                trained,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                branch_rate_factor=self.branch_rate_factor,
            )
            self.optimizer = kind(groups, **options)
        return self.optimizer


class WholeBlocks(Dataset):
    """Packed blocks [N, seq_len] in their own order, for evaluation while training."""

    def __init__(self, blocks: np.ndarray) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.blocks[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


class _Log(TrainerCallback):
    """Keeps the rows of train.jsonl, in the checkpoints too; stops at the first loss or gradient that is not finite."""

    def __init__(
        self, settings: ScratchSettings, tokens_per_step: int, flops_per_token: int, arm: str, show: Advance
    ) -> None:
        self.settings, self.arm, self.show = settings, arm, show
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.rows: list[dict[str, Any]] = []
        self.last_step = 0
        self.mark: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.rows = [entry["row"] for entry in state.log_history if "row" in entry]
        self.last_step = self.rows[-1]["step"] if self.rows else 0

    def on_step_begin(self, args, state, control, **kwargs):
        # What evaluation, saving and the start of the loader take is not part of a step.
        self.mark = time.perf_counter() if self.mark is None else self.mark

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs or state.global_step == self.last_step or self.mark is None:
            return
        advice = "lower --lr, raise --warmup-steps or use --dtype float32"
        loss, norm = finite_step(logs, state.global_step, self.arm, advice)
        now = time.perf_counter()
        tokens = (state.global_step - self.last_step) * self.tokens_per_step
        speed = tokens / (now - self.mark)
        row = {
            "step": state.global_step,
            "loss": loss,
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": norm,
            "tokens": tokens,
            "seconds": round(now - self.mark, 4),
            "tokens_per_second": round(speed, 1),
        }
        note = f"loss {loss:.3f}, {speed:,.0f} tokens/s"
        if self.settings.peak_flops:
            row["mfu"] = round(speed * self.flops_per_token / (world_size() * self.settings.peak_flops), 4)
            note += f", MFU {row['mfu']:.0%}"
        self.rows.append(row)
        state.log_history[-1]["row"] = row
        # For TensorBoard, which is told after us.
        logs.update({name: row[name] for name in ("tokens_per_second", "mfu") if name in row})
        self.last_step, self.mark = state.global_step, now
        self.show(state.global_step, note)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        loss = float((metrics or {})["eval_loss"])
        if not math.isfinite(loss):
            raise DivergedError(
                f"arm {self.arm}: the evaluation loss is {loss} at step {state.global_step}: lower --lr"
            )
        if self.rows and self.rows[-1]["step"] == state.global_step:
            self.rows[-1]["eval_loss"] = loss
        self.mark = None

    def on_save(self, args, state, control, **kwargs):
        self.mark = None


def train_scratch(
    model: nn.Module,
    blocks: np.ndarray,
    settings: ScratchSettings,
    *,
    arm: str,
    checkpoints: Path,
    log: Path,
    evaluation: np.ndarray | None = None,
    advance: Advance = no_progress,
) -> list[dict[str, Any]]:
    """Train every parameter of a model.

    An earlier, interrupted call with the same arguments is continued from its last whole checkpoint, with the result
    of an uninterrupted one. The order of the blocks depends on the seed alone: a training of more steps begins as one
    of fewer.

    Args:
        model: a causal language model of transformers, fp32, freshly initialised.
        blocks: token blocks [N, seq_len].
        settings: how.
        arm: name for messages.
        checkpoints: folder for the trainer's checkpoints.
        log: train.jsonl; trackers that write files put them beside it.
        evaluation: token blocks [M, seq_len] whose mean loss is logged as `eval_loss`; None for none.
        advance: progress, called as advance(step, note).

    Returns:
        The rows of the log: step, loss (nats per token), learning_rate (of all but the branch), grad_norm (before
        clipping), tokens, seconds, tokens_per_second, mfu where a peak is given, eval_loss where it was evaluated.

    Raises:
        PreskipError: a loss that is not finite, a batch that cannot be shared out, or a full disk.
    """
    device = next(model.parameters()).device
    micro_batch, accumulation = share_batch(settings.batch_size, settings.micro_batch_size)
    evaluates = evaluation is not None and settings.eval_steps is not None
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=settings.steps,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULE,
        lr_scheduler_kwargs={"min_lr_rate": settings.final_rate},
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.beta2,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=settings.dtype == "bfloat16",
        torch_compile=settings.compile,
        train_sampling_strategy="sequential",
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_steps if evaluates else None,
        prediction_loss_only=True,
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
        report_to=[name for name in settings.report_to if name != "tensorboard"],
    )
    seq_len = blocks.shape[1]
    tokens = settings.batch_size * seq_len
    steps = _Log(settings, tokens, training_flops_per_token(model, seq_len), arm, advance)
    with shared_training(model) as trained:
        trainer = ScratchTrainer(
            model=trained,
            args=arguments,
            train_dataset=BlockDataset(blocks, settings.steps * settings.batch_size, settings.seed),
            eval_dataset=WholeBlocks(evaluation) if evaluation is not None and evaluates else None,
            data_collator=stack_rows,
            callbacks=[steps, *(_tensorboard(settings.report_to, log.parent) if is_main() else [])],
            branch_rate_factor=settings.branch_rate_factor,
        )
        trainer.remove_callback(PrinterCallback)
        adapt_trainer(trainer)
        with clear_disk_errors(checkpoints):
            trainer.train(resume_from_checkpoint=True)
    if is_main():
        write_jsonl(log, steps.rows)
    return steps.rows


def trackers(asked: Sequence[str]) -> tuple[str, ...]:
    """The trackers to report to: as asked; for "auto" TensorBoard where it is installed; for "none" none.

    Raises:
        PreskipError: TensorBoard was asked for and is not installed.
    """
    installed = find_spec("tensorboard") is not None or find_spec("tensorboardX") is not None
    if tuple(asked) == ("auto",):
        return ("tensorboard",) if installed else ()
    if "tensorboard" in asked and not installed:
        raise PreskipError("--report-to tensorboard: it is not installed; `pip install tensorboard`, or leave it out")
    return tuple(name for name in asked if name != "none")


def _tensorboard(report_to: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """TensorBoard's files beside the log: Trainer's own place for them is removed with the checkpoints."""
    if "tensorboard" not in report_to:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(log_dir=str(folder / "tensorboard")))]
