"""Training from scratch with Hugging Face `Trainer`: packed blocks, cosine with warm-up, AdamW in groups, a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import StackDataset
from transformers import TrainerCallback

from preskip.arms.flops import looked_up, training_flops_per_token
from preskip.attach import CHILD, forget_compiled
from preskip.errors import DivergedError, PreskipError, explained, one_line
from preskip.progress import Advance, no_progress
from preskip.runs.schema import StepRow
from preskip.train.checkpoints import ResumableTrainer
from preskip.train.distributed import is_main, world_size
from preskip.train.settings import ScratchSettings
from preskip.train.steps import BlockDataset, StepLog, fit

__all__ = ["ScratchSettings", "ScratchTrainer", "parameter_groups", "trackers", "train_scratch"]

SCHEDULE = "cosine_with_min_lr"


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
    embeddings = looked_up(model)
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


class _Log(StepLog):
    """Adds speed and utilisation, and the evaluations; what these, saving and the loader's start take is no step's."""

    advice = "lower --lr, raise --warmup-steps or use --dtype float32"
    counts_loading = True

    def __init__(self, settings: ScratchSettings, flops_per_token: int, *args: Any) -> None:
        super().__init__(*args)
        self.settings, self.flops_per_token = settings, flops_per_token
        self.paused = 0.0  # when training last stood still: what follows until it goes on is no step's

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        self.paused = time.perf_counter()

    def complete(self, row: StepRow, seconds: float, logs: dict[str, Any]) -> str:
        """See `StepLog`."""
        speed = row["tokens"] / seconds
        row["tokens_per_second"] = round(speed, 1)
        note = f", {speed:,.0f} tokens/s"
        if self.settings.peak_flops:
            row["mfu"] = round(speed * self.flops_per_token / (world_size() * self.settings.peak_flops), 4)
            note += f", MFU {row['mfu']:.0%}"
        # For TensorBoard, which is told after us.
        logs.update({name: value for name, value in row.items() if name in ("tokens_per_second", "mfu")})
        return note

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        loss = float((metrics or {})["eval_loss"])
        if not math.isfinite(loss):
            raise DivergedError(
                f"arm {self.arm}: the evaluation loss is {loss} at step {state.global_step}: lower --lr"
            )
        if self.rows and self.rows[-1]["step"] == state.global_step:
            self.rows[-1]["eval_loss"] = loss
        self._go_on()

    def on_save(self, args, state, control, **kwargs):
        self._go_on()

    def _go_on(self) -> None:
        now = time.perf_counter()
        if self.mark is not None:
            self.mark += now - max(self.mark, self.paused)
        self.paused = now


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
) -> list[StepRow]:
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

    Raises:
        PreskipError: a loss that is not finite, a batch that cannot be shared out, or a full disk.
    """
    held: StackDataset | None = None
    if evaluation is not None and settings.eval_steps is not None:
        ids: Any = torch.from_numpy(evaluation.astype(np.int64))
        held = StackDataset(input_ids=ids, labels=ids)
    seq_len = blocks.shape[1]
    tokens = settings.batch_size * seq_len
    if settings.compile:
        # The graphs of models that were trained before count against dynamo's limit for a module's code; beyond it
        # the next models would run eagerly without a word.
        forget_compiled()
    with _own_wandb_run():
        return fit(
            model,
            settings,
            _Log(settings, training_flops_per_token(model, seq_len), arm, tokens, advance),
            BlockDataset(blocks, settings.steps * settings.batch_size, settings.seed),
            checkpoints=checkpoints,
            log=log,
            trainer=partial(ScratchTrainer, branch_rate_factor=settings.branch_rate_factor),
            callbacks=_tensorboard(settings.report_to, log.parent) if is_main() else [],
            evaluation=held,
            lr_scheduler_type=SCHEDULE,
            lr_scheduler_kwargs={"min_lr_rate": settings.final_rate},
            warmup_steps=settings.warmup_steps,
            weight_decay=settings.weight_decay,
            adam_beta2=settings.beta2,
            max_grad_norm=settings.max_grad_norm,
            optim="adamw_torch_fused",
            bf16=settings.dtype == "bfloat16",
            torch_compile=settings.compile,
            tf32=False if settings.compile else None,  # else compiling puts the process's products into TF32
            logging_steps=settings.log_steps,
            eval_strategy="no" if held is None else "steps",
            eval_steps=None if held is None else settings.eval_steps,
            prediction_loss_only=True,
            report_to=[name for name in settings.report_to if name != "tensorboard"],
            run_name=f"{arm} seed {settings.seed}",  # of trackers
        )


@contextmanager
def _own_wandb_run() -> Iterator[None]:
    """A run of W&B that a training begins ends with it, also by an error: the next training would go on in it."""

    def running() -> bool:
        wandb: Any = sys.modules.get("wandb")
        return wandb is not None and wandb.run is not None

    before = running()
    try:
        yield
    finally:
        if running() and not before:
            sys.modules["wandb"].finish()


def trackers(asked: Sequence[str]) -> tuple[str, ...]:
    """The trackers to report to: as asked; for "auto" TensorBoard where it is installed; for "none" none.

    Raises:
        PreskipError: a tracker is unknown to transformers, or cannot be used here.
    """
    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    installed = find_spec("tensorboard") is not None or find_spec("tensorboardX") is not None
    if tuple(asked) == ("auto",):
        return ("tensorboard",) if installed else ()
    if "tensorboard" in asked and not installed:
        raise PreskipError("--report-to tensorboard: it is not installed; `pip install tensorboard`, or leave it out")
    names = tuple(name for name in asked if name != "none")
    if names == ("all",):
        names = tuple(integration_utils.get_available_reporting_integrations())
    for name in names:
        if name not in known:
            raise PreskipError(
                f"--report-to {name} is unknown to transformers: choose among {', '.join(known)} or none"
            )
        if name != "tensorboard":  # which `_tensorboard` makes
            with explained(partial(_tracker_fault, name)):
                known[name]()
    return names


def missing_trackers(asked: Sequence[str]) -> tuple[str, ...]:
    """Those of some trackers that cannot be used here."""
    missing = []
    for name in asked:
        try:
            trackers((name,))
        except PreskipError:
            missing.append(name)
    return tuple(missing)


def _tracker_fault(name: str, error: Exception) -> str:
    return f"--report-to {name}: {one_line(error)}"


def _tensorboard(report_to: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """TensorBoard's files beside the log: Trainer's own place for them is removed with the checkpoints."""
    if "tensorboard" not in report_to:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(log_dir=str(folder / "tensorboard")))]
