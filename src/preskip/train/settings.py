"""How an arm on a frozen model is trained: what the trainer, its controls and the null of noise have in common."""

from __future__ import annotations

from dataclasses import dataclass

from preskip.errors import PreskipError

CONTROLS = ("none", "noise", "shuffled")
MAX_GRAD_NORM = 1.0
WEIGHT_DECAY = 0.0
SCHEDULE = "cosine"


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How an arm is trained.

    Args:
        steps: optimiser steps.
        batch_size: sequences per optimiser step, over all processes.
        micro_batch_size: sequences per forward pass of a process, at most; must divide its share of the batch.
        learning_rate: peak; linear warm-up over a tenth of the steps, then cosine to 0 (as the paper).
        seed: of the data order, dropout and initialisation.
        gradient_checkpointing: recompute activations in the backward pass.
        save_steps: optimiser steps between two checkpoints.
        control: "none", or a null of the depth picture: "noise" (gradients of noise, no text) or "shuffled" (targets in
            random order within each sequence); see `preskip.train.controls`.
        equal_step: rescale each layer's update to the same ‖ΔW‖ / ‖W‖; see `preskip.train.controls.EqualStep`.

    Raises:
        PreskipError: an unknown control.
    """

    steps: int
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    seed: int
    gradient_checkpointing: bool = False
    save_steps: int = 50
    control: str = "none"
    equal_step: bool = False

    def __post_init__(self) -> None:
        if self.control not in CONTROLS:
            raise PreskipError(f"control={self.control!r} is not possible: choose {', '.join(CONTROLS)}")

    @property
    def warmup_steps(self) -> int:
        """A tenth of the steps, at least one (paper: 50 of 500)."""
        return max(1, self.steps // 10)
