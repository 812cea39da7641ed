"""The arms that can be compared, by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from preskip.arms.arm import Arm, ArmContext
from preskip.arms.budget import lora_ranks, match_expansion, target_width
from preskip.errors import PreskipError

if TYPE_CHECKING:
    from peft import PeftConfig


# The share of layers, from the top, that the arm preskip-late adapts.
LATE = 0.25
# Rank of the skip in the arm preskip-lowrank, as a share of the width.
LOW_RANK = 1 / 8


def _branch(
    context: ArmContext, *, match: bool = True, targets: tuple[str, ...] | None = None, **changes: Any
) -> PeftConfig:
    """A Preskip adapter whose branch differs from the reference in `changes`, its expansion solved for the budget."""
    from preskip.adapter import PreskipConfig

    chosen = context.targets if targets is None else targets
    settings = replace(context.settings, **changes)
    if match and (changes or targets is not None):
        settings = match_expansion(context.base, settings, context.budget, chosen)
    config = PreskipConfig(**asdict(settings), skip_position=context.skip_position)
    if context.by_name or targets is not None:
        config.target_modules = set(chosen)  # type: ignore[assignment]
    elif context.layers is not None:
        config.layers_to_transform = list(context.layers)
    return config


def _late(context: ArmContext) -> PeftConfig:
    count = max(1, round(LATE * len(context.targets)))
    return _branch(context, targets=context.targets[-count:])


def _low_rank(context: ArmContext) -> PeftConfig:
    d = target_width(context.base, context.targets[0])
    return _branch(context, content_skip=True, skip_rank=max(1, int(LOW_RANK * d)))


def _lora(context: ArmContext, **options: Any) -> PeftConfig:
    from peft import LoraConfig

    ranks = lora_ranks(context.base, context.budget, context.targets, magnitudes=options.get("use_dora", False))
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
        **options,
    )


# To add an arm: a name, a sentence, a learning rate to start from, and the PEFT configuration for a context.
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
            make_config=_branch,
        ),
        Arm(
            name="preproj",
            description="pre-projection alone, wider to match",
            learning_rate=5e-4,
            make_config=partial(_branch, content_skip=False, skip_rank=None, enrich_attention=True),
        ),
        Arm(
            name="skip",
            description="linear content skip alone; it cannot be widened, so it trains fewer weights",
            learning_rate=5e-4,
            make_config=partial(
                _branch, match=False, preprojection=False, gated=False, enrich_attention=True, content_skip=True
            ),
            matched=False,
        ),
        Arm(
            name="content",
            description="attention reads x̂ as before, only the skip carries the enriched features",
            learning_rate=5e-4,
            make_config=partial(_branch, enrich_attention=False, preprojection=True, content_skip=True),
        ),
        Arm(
            name="parallel",
            description="parallel adapter: the features join attention's output and never feed Q/K/V",
            learning_rate=5e-4,
            make_config=partial(
                _branch, enrich_attention=False, content_skip=False, skip_rank=None, preprojection=True
            ),
        ),
        Arm(
            name="preskip-gated",
            description="preskip with a gated pre-projection, narrower to match",
            learning_rate=5e-4,
            make_config=partial(_branch, gated=True, preprojection=True),
        ),
        Arm(
            name="preskip-lowrank",
            description="preskip with a skip of rank d/8 and a wider pre-projection to match",
            learning_rate=5e-4,
            make_config=_low_rank,
        ),
        Arm(
            name="preskip-late",
            description="preskip in the last quarter of the adapted layers, wider to match",
            learning_rate=5e-4,
            make_config=_late,
        ),
        Arm(
            name="lora",
            description="LoRA on the attention's Q, K, V and output projections",
            learning_rate=1e-3,
            make_config=_lora,
        ),
        Arm(
            name="dora",
            description="DoRA on the attention's Q, K, V and output projections",
            learning_rate=1e-3,
            make_config=partial(_lora, use_dora=True),
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
