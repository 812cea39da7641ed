"""How an arm is trained: what every training states, and what is particular to a frozen model and from scratch."""

from __future__ import annotations

from dataclasses import dataclass

from preskip.errors import PreskipError

CONTROLS = ("none", "noise", "shuffled")
MAX_GRAD_NORM = 1.0
WEIGHT_DECAY = 0.0
SCHEDULE = "cosine"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every training states.

    Args:
        steps: optimiser steps.
        batch_size: sequences per optimiser step, over all processes.
        micro_batch_size: sequences per forward pass of a process, at most; must divide its share of the batch.
        learning_rate: peak; linear warm-up, then a cosine.
        seed: of the data order, dropout and, on a frozen model, initialisation.
        gradient_checkpointing: recompute activations in the backward pass.
        save_steps: optimiser steps between two checkpoints.
        keep_checkpoints: how many of the newest are kept while training; 2 or more, to have one to fall back on.
    """

    steps: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    seed: int
    gradient_checkpointing: bool = False
    save_steps: int = 50
    keep_checkpoints: int = 2


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Settings):
    """How an arm on a frozen model is trained: warm-up over a tenth of the steps, then cosine to 0 (as the paper).

    Args:
        control: "none", or a null of the depth picture: "noise" (gradients of noise, no text) or "shuffled" (targets in
            random order within each sequence); see `preskip.train.controls`.
        equal_step: rescale each layer's update to the same ‖ΔW‖ / ‖W‖; see `preskip.train.controls.EqualStep`.

    Raises:
        PreskipError: an unknown control.
    """

    control: str = "none"
    equal_step: bool = False

    def __post_init__(self) -> None:
        if self.control not in CONTROLS:
            raise PreskipError(f"control={self.control!r} is not possible: choose {', '.join(CONTROLS)}")

    @property
    def warmup_steps(self) -> int:
        """A tenth of the steps, at least one (paper: 50 of 500)."""
        return max(1, self.steps // 10)


@dataclass(frozen=True, kw_only=True)
class ScratchSettings(Settings):
    """How a model is trained from scratch.

    Args:
        warmup_steps: steps of the warm-up.
        save_steps: optimiser steps between two checkpoints. Default 500.
        final_rate: learning rate at the end, as a share of the peak. Default 0.1.
        weight_decay: of matrices; norms, biases and embeddings (and an output head tied to one) have none.
        beta2: AdamW's second decay. Default 0.95, usual where a language model is trained from scratch.
        max_grad_norm: the gradient is clipped to this norm.
        branch_rate_factor: learning rate of the branch's matrices over that of the rest.
        dtype: the forward pass computes in this: "float32" or "bfloat16" (autocast; weights and optimiser stay fp32).
        compile: `torch.compile` the model.
        log_steps: optimiser steps per line of the log.
        eval_steps: optimiser steps between two evaluations, a multiple of `log_steps`; None never evaluates.
        report_to: experiment trackers of Trainer, e.g. ("tensorboard", "wandb").
        peak_flops: FLOPs per second of a process that utilisation is held against; None leaves it out.
    """

    warmup_steps: int
    save_steps: int = 500
    final_rate: float = 0.1
    weight_decay: float = 0.1
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    branch_rate_factor: float = 1.0
    dtype: str = "float32"
    compile: bool = False
    log_steps: int = 1
    eval_steps: int | None = None
    report_to: tuple[str, ...] = ()
    peak_flops: float | None = None
