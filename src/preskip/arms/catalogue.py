"""The arms that can be compared, by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from preskip.arms.arm import Arm, ArmContext
from preskip.arms.budget import lora_ranks
from preskip.errors import PreskipError

if TYPE_CHECKING:
    from peft import PeftConfig


def _preskip(context: ArmContext) -> PeftConfig:
    from preskip.adapter import PreskipConfig

    config = PreskipConfig(**asdict(context.settings), skip_position=context.skip_position)
    if context.by_name:
        config.target_modules = set(context.targets)  # type: ignore[assignment]
    elif context.layers is not None:
        config.layers_to_transform = list(context.layers)
    return config


def _lora(context: ArmContext) -> PeftConfig:
    from peft import LoraConfig

    ranks = lora_ranks(context.base, context.budget, context.targets)
    pattern = {re.escape(name): rank for name, rank in ranks.rank_pattern.items()}
    # alpha = rank keeps the update's scale at 1 whatever rank the budget gives.
    return LoraConfig(
        r=ranks.rank,
        lora_alpha=ranks.rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=list(ranks.targets),
        lora_dropout=0.0,
        bias="none",
    )


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(
            name="none",
            description="the pretrained model as it is",
            learning_rate=None,
            make_config=None,
            matched=False,
        ),
        Arm(
            name="preskip",
            description="pre-projection before Q/K/V and content skip around attention",
            learning_rate=5e-4,
            make_config=_preskip,
        ),
        Arm(
            name="lora",
            description="LoRA on the attention's Q, K, V and output projections",
            learning_rate=1e-3,
            make_config=_lora,
        ),
    )
}


def resolve_arms(names: Sequence[str]) -> list[Arm]:
    """Arms by name, in the given order, `none` first.

    Raises:
        PreskipError: an unknown name, a name twice, or none at all.
    """
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise PreskipError(f"unknown arm {unknown[0]!r}: choose from {', '.join(ARMS)}")
    if not names or len(set(names)) != len(names):
        raise PreskipError("--arms needs one or more different arms")
    return [ARMS[name] for name in sorted(names, key=lambda name: name != "none")]
