"""What makes an arm out of a context: its PEFT configurations, the peers' settings, the names of what it trains."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from preskip.arms.arm import ArmContext
from preskip.arms.budget import branch_parameters, linear_shapes, lora_ranks, match_expansion, target_width
from preskip.arms.modules import ia3_modules, norm_paths
from preskip.errors import PreskipError

if TYPE_CHECKING:
    from peft import PeftConfig

# The share of layers, from the top, that the arms preskip-late and preskip-third-narrow adapt.
LATE, THIRD = 1 / 4, 1 / 3
# Rank of the skip in the arms preskip-lowrank and preskip-bottleneck, as a share of the width.
LOW_RANK = 1 / 8
# Expansion of the arm preskip-bottleneck.
BOTTLENECK = 1 / 4
# rsLoRA scales by alpha / √rank; alpha is PEFT's usual one, since it is not to grow with the rank.
RSLORA_ALPHA = 16


def branch(
    context: ArmContext, *, match: bool = True, targets: tuple[str, ...] | None = None, **changes: Any
) -> PeftConfig:
    """A Preskip adapter whose branch differs from the reference in `changes`, its expansion solved for the budget.

    A branch's forward FLOPs are twice its parameters, as the reference's are, so one expansion matches both.
    """
    from preskip.adapter import PreskipConfig

    chosen = context.targets if targets is None else targets
    settings = replace(context.settings, **changes)
    if match and context.match != "none" and (changes or targets is not None):
        settings = match_expansion(context.base, settings, context.budget, chosen)
    by_name = context.by_name or targets is not None
    return PreskipConfig(
        **asdict(settings),
        skip_position=context.skip_position,
        target_modules=list(chosen) if by_name else None,
        layers_to_transform=None if by_name or context.layers is None else list(context.layers),
    )


def late(context: ArmContext, *, share: float = LATE, match: bool = True) -> PeftConfig:
    """A branch in the last share of the adapted layers alone."""
    return branch(context, match=match, targets=context.targets[-late_layers(share, len(context.targets)) :])


def late_layers(share: float, layers: int) -> int:
    """How many layers a share of them is, at least one."""
    return max(1, round(share * layers))


def low_rank(context: ArmContext, *, match: bool = True, **changes: Any) -> PeftConfig:
    """A branch whose skip has a rank of d/8."""
    d = target_width(context.base, context.targets[0])
    return branch(context, match=match, content_skip=True, skip_rank=max(1, int(LOW_RANK * d)), **changes)


def lora(context: ArmContext, arm: str, *, part: str = "all", budget: int | None = None, **options: Any) -> PeftConfig:
    """LoRA or one of its kin on a part of the linear layers: "all", "attention" or "mlp"; `options` are LoRA's."""
    from peft import LoraConfig

    magnitudes = {"params": 1.0, "flops": 0.5}.get(context.match, 0.0) if options.get("use_dora") else 0.0
    shape = _low_rank_shape(context, arm, part, budget, magnitudes=magnitudes)
    # In proportion to the rank, so that the update's scale is the same whatever rank the budget gives.
    alpha: dict[str, Any] = {
        "lora_alpha": _scaled(shape["r"], context.lora_scale),
        "alpha_pattern": {name: _scaled(own, context.lora_scale) for name, own in shape["rank_pattern"].items()},
    }
    if options.get("use_rslora"):
        alpha = {"lora_alpha": RSLORA_ALPHA}
    return LoraConfig(**shape, lora_dropout=0.0, bias="none", **alpha, **options)


def hira(context: ArmContext) -> PeftConfig:
    """ΔW = W ⊙ (B·A), as many weights as LoRA of that rank."""
    if context.match == "flops":
        raise PreskipError(
            "it adds a second product of the base's size, whatever its rank: match params, or leave it out"
        )
    try:
        from peft import HiraConfig
    except ImportError as error:
        raise PreskipError(
            "this version of peft has no HiRA: install peft 0.21 or newer, or leave the arm out"
        ) from error
    # PEFT 0.21 reads a rank pattern of HiRA's and does not use it.
    return HiraConfig(**_low_rank_shape(context, "hira", "all", common=True))


def _low_rank_shape(context: ArmContext, arm: str, part: str, budget: int | None = None, **how: Any) -> dict[str, Any]:
    """Targets and ranks of an arm of LoRA's kind: those that the budget gives, or the user's own rank for all."""
    shapes = linear_shapes(context.base, context.targets, part)
    if context.match == "none":
        return {"r": _own_rank(context, arm), "rank_pattern": {}, "target_modules": list(shapes)}
    ranks = lora_ranks(shapes, budget or context.budget, whole=context.budget, **how)
    pattern = {re.escape(name): rank for name, rank in ranks.rank_pattern.items()}
    return {"r": ranks.rank, "rank_pattern": pattern, "target_modules": list(ranks.targets)}


def _own_rank(context: ArmContext, arm: str) -> int:
    """The rank that the user gave to an arm, as a number or as a share of the width."""
    given = context.lora_ranks.get(arm)
    if given is None:
        raise PreskipError(f"--match none leaves its rank open: give --lora-rank, or --lora-rank {arm}=NUMBER")
    return int(given) if given >= 1 else max(1, round(given * target_width(context.base, context.targets[0])))


def _scaled(rank: int, scale: float) -> int | float:
    """LoRA's alpha; whole where it can be, as other libraries expect it."""
    alpha = scale * rank
    return int(alpha) if alpha.is_integer() else alpha


def preproj_lora(context: ArmContext) -> list[PeftConfig]:
    """The pre-projection at its own size, and LoRA with the weights that the skip would have had."""
    preproj = replace(context.settings, preprojection=True, content_skip=False, skip_rank=None, enrich_attention=True)
    rest = context.budget - branch_parameters(context.base, preproj, context.targets)
    if context.match != "none" and rest <= 0:
        raise PreskipError("the reference has no content skip whose weights LoRA could take: leave the arm out")
    return [
        branch(context, match=False, content_skip=False, skip_rank=None, preprojection=True, enrich_attention=True),
        lora(context, "preproj+lora", part="attention", budget=rest),
    ]


def ia3(context: ArmContext) -> PeftConfig:
    """IA3: one factor per key, value and inner feature of the MLP."""
    from peft import IA3Config

    targets, feedforward = ia3_modules(context)
    return IA3Config(target_modules=targets, feedforward_modules=feedforward)


def layer_norms(context: ArmContext) -> PeftConfig:
    """The weights of the norms."""
    from peft import LNTuningConfig

    return LNTuningConfig(target_modules=norm_paths(context))


def all_parameters(context: ArmContext) -> list[str]:
    """Names of every weight of the base."""
    return [name for name, _ in context.base.named_parameters()]


def gated(context: ArmContext, **changes: Any) -> dict[str, dict[str, Any]]:
    """A branch behind a gate, its expansion solved for what the gate leaves of the budget."""
    if context.skip_position != "attention":
        raise PreskipError("its skip joins attention's output only: give --skip-position attention, or leave it out")
    settings = replace(context.settings, preprojection=True, content_skip=True, **changes)
    widths = [target_width(context.base, path) for path in context.targets]
    # Of parameters a weight per channel and one; of FLOPs, at two per parameter, the multiplications by g as well.
    gate = {"params": sum(widths) + len(widths), "flops": (3 + settings.enrich_attention) * sum(widths) // 2}
    if context.match in gate:
        settings = match_expansion(context.base, settings, context.budget - gate[context.match], context.targets)
    return {"gated-branch": asdict(settings)}
