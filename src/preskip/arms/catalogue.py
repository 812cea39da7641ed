"""The arms that can be compared, on a frozen base and from scratch, by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from preskip.arms.arm import Arm, ArmContext
from preskip.arms.budget import branch_parameters, linear_shapes, lora_ranks, match_expansion, target_width
from preskip.arms.modules import bias_names, ia3_modules, norm_paths
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
# Arms whose rank is open where nothing is matched.
LORA_ARMS = ("lora", "lora-attention", "lora-mlp", "dora", "rslora", "hira", "preproj+lora")


def _branch(
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
    config = PreskipConfig(**asdict(settings), skip_position=context.skip_position)
    if context.by_name or targets is not None:
        config.target_modules = set(chosen)  # type: ignore[assignment]
    elif context.layers is not None:
        config.layers_to_transform = list(context.layers)
    return config


def _late(context: ArmContext, *, share: float = LATE, match: bool = True) -> PeftConfig:
    count = max(1, round(share * len(context.targets)))
    return _branch(context, match=match, targets=context.targets[-count:])


def _low_rank(context: ArmContext, *, match: bool = True, **changes: Any) -> PeftConfig:
    d = target_width(context.base, context.targets[0])
    return _branch(context, match=match, content_skip=True, skip_rank=max(1, int(LOW_RANK * d)), **changes)


def _lora(context: ArmContext, arm: str, *, part: str = "all", budget: int | None = None, **options: Any) -> PeftConfig:
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


def _hira(context: ArmContext) -> PeftConfig:
    """ΔW = W ⊙ (B·A), as many weights as LoRA of that rank."""
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


def _preproj_lora(context: ArmContext) -> list[PeftConfig]:
    """The pre-projection at its own size, and LoRA with the weights that the skip would have had."""
    preproj = replace(context.settings, preprojection=True, content_skip=False, skip_rank=None, enrich_attention=True)
    rest = context.budget - branch_parameters(context.base, preproj, context.targets)
    if context.match != "none" and rest <= 0:
        raise PreskipError("the reference has no content skip whose weights LoRA could take: leave the arm out")
    return [
        _branch(context, match=False, content_skip=False, skip_rank=None, preprojection=True, enrich_attention=True),
        _lora(context, "preproj+lora", part="attention", budget=rest),
    ]


def _ia3(context: ArmContext) -> PeftConfig:
    from peft import IA3Config

    targets, feedforward = ia3_modules(context)
    return IA3Config(target_modules=targets, feedforward_modules=feedforward)


def _layer_norms(context: ArmContext) -> PeftConfig:
    from peft import LNTuningConfig

    return LNTuningConfig(target_modules=norm_paths(context))


def _all_parameters(context: ArmContext) -> list[str]:
    return [name for name, _ in context.base.named_parameters()]


def _gated(context: ArmContext, **changes: Any) -> dict[str, dict[str, Any]]:
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


def _branch_arm(name: str, description: str, *, match: bool = True, decisive: bool = False, **changes: Any) -> Arm:
    """A branch that differs from the reference's in `changes`, on a frozen base and from scratch."""
    return Arm(
        name,
        description,
        5e-4,
        make_config=partial(_branch, match=match, **changes),
        build=lambda planner: planner.branch(match=match, **changes),
        budget="matched" if match else "smaller",
        decisive=decisive,
    )


def _peer(
    name: str,
    description: str,
    peers: dict[str, dict[str, Any]],
    *,
    learning_rate: float | None = None,
) -> tuple[Arm, Arm]:
    """A peer of few weights alone, and crossed with preskip, whose branch is narrower by them.

    Args:
        name: of the arm alone; with preskip it is preskip+name.
        description: one sentence.
        peers: settings by name (`preskip.peers.names.PEERS`).
        learning_rate: to start from on a frozen base; None for a peer that is trained from scratch only.
    """
    alone = Arm(
        name,
        description,
        learning_rate,
        peers={} if learning_rate is None else peers,
        build=lambda planner: planner.peers(peers),
        budget="smaller",
    )
    crossed = Arm(
        f"preskip+{name}",
        f"preskip and {name}, its pre-projection narrower to match",
        build=lambda planner: planner.peers(peers, branch=True),
    )
    return alone, crossed


# To add an arm: a name, a sentence, and what makes it: the PEFT configuration for a context and a learning rate to
# start from, the architecture for a planner, or both. The decisive ones are declared against in this order.
REGISTRY = (
    Arm("none", "the pretrained model as it is", budget="floor", decisive=True),
    _branch_arm("preskip", "pre-projection before Q/K/V and content skip around attention"),
    _branch_arm(
        "preproj", "pre-projection alone, wider to match", content_skip=False, skip_rank=None, enrich_attention=True
    ),
    _branch_arm(
        "skip",
        "linear content skip alone; it cannot be widened, so it trains fewer weights",
        match=False,
        preprojection=False,
        gated=False,
        enrich_attention=True,
        content_skip=True,
    ),
    _branch_arm(
        "content",
        "attention reads x̂ as before, only the skip carries the enriched features",
        enrich_attention=False,
        preprojection=True,
        content_skip=True,
    ),
    Arm(
        "lora",
        "LoRA on all linear layers of the blocks",
        1e-3,
        make_config=partial(_lora, arm="lora"),
        decisive=True,
    ),
    Arm(
        "lora-attention",
        "LoRA on the attention's Q, K, V and output projections alone",
        1e-3,
        make_config=partial(_lora, arm="lora-attention", part="attention"),
        decisive=True,
    ),
    Arm(
        "base-wide",
        "the MLP widened until the model has as many weights as preskip",
        build=lambda planner: planner.wider(),
        decisive=True,
    ),
    Arm(
        "base-flops",
        "the architecture as it is, trained on as many more tokens as preskip's FLOPs pay for",
        build=lambda planner: planner.plain,
        matches="training FLOPs",
        decisive=True,
    ),
    Arm("base", "the architecture as it is", build=lambda planner: planner.plain, budget="smaller", decisive=True),
    Arm(
        "base-deep",
        "layers added until the model comes nearest to preskip's weights",
        build=lambda planner: planner.deeper(),
        decisive=True,
    ),
    _branch_arm(
        "parallel",
        "parallel adapter: the features join attention's output and never feed Q/K/V",
        decisive=True,
        enrich_attention=False,
        content_skip=False,
        skip_rank=None,
        preprojection=True,
    ),
    _branch_arm(
        "preskip-gated", "preskip with a gated pre-projection, narrower to match", gated=True, preprojection=True
    ),
    Arm(
        "preskip-lowrank",
        "preskip with a skip of rank d/8 and a wider pre-projection to match",
        5e-4,
        make_config=_low_rank,
    ),
    Arm(
        "preskip-lowrank-narrow",
        "preskip with a skip of rank d/8, as wide as in preskip",
        5e-4,
        make_config=partial(_low_rank, match=False),
        budget="smaller",
    ),
    Arm(
        "preskip-bottleneck",
        "preskip with an inner width of d/4 and a skip of rank d/8",
        5e-4,
        make_config=partial(_low_rank, match=False, preprojection=True, expansion=BOTTLENECK),
        budget="smaller",
    ),
    Arm("preskip-late", "preskip in the last quarter of the adapted layers, wider to match", 5e-4, make_config=_late),
    Arm(
        "preskip-late-narrow",
        "preskip in the last quarter of the adapted layers, as wide as in preskip",
        5e-4,
        make_config=partial(_late, match=False),
        budget="smaller",
    ),
    Arm(
        "preskip-third-narrow",
        "preskip in the last third of the adapted layers, as wide as in preskip",
        5e-4,
        make_config=partial(_late, share=THIRD, match=False),
        budget="smaller",
    ),
    Arm(
        "lora-mlp",
        "LoRA on the linear layers outside attention",
        1e-3,
        make_config=partial(_lora, arm="lora-mlp", part="mlp"),
    ),
    Arm(
        "dora",
        "DoRA on all linear layers of the blocks",
        1e-3,
        make_config=partial(_lora, arm="dora", use_dora=True),
    ),
    Arm(
        "rslora",
        "rank-stabilised LoRA (scale 16/√rank) on all linear layers of the blocks",
        1e-3,
        make_config=partial(_lora, arm="rslora", use_rslora=True),
    ),
    Arm(
        "hira",
        "HiRA (the weight times a low-rank matrix, entry by entry) on all linear layers",
        1e-3,
        make_config=_hira,
    ),
    Arm(
        "preproj+lora",
        "pre-projection, and LoRA on attention with the weights that the skip would have had",
        5e-4,
        make_config=_preproj_lora,
    ),
    *_peer("canon-a", "before Q/K/V each token is mixed with the three before it, channel by channel", {"canon-a": {}}),
    *_peer(
        "canon",
        "each token is mixed with the three before it at four places: before and behind Q/K/V and the MLP's features",
        {"canon": {}},
        learning_rate=3e-3,
    ),
    Arm(
        "base-wide+canon-a",
        "canon-a, the MLP widened until the model has as many weights as preskip",
        build=lambda planner: planner.wider_with({"canon-a": {}}),
    ),
    *_peer(
        "value-residual",
        "every layer attends to its own values and to those of the first layer",
        {"value-residual": {}},
        learning_rate=1e-2,
    ),
    Arm(
        "value-embed",
        "values get a part looked up by token, the MLP widened by the rest of the branch's weights",
        build=lambda planner: planner.value_embed(),
    ),
    Arm(
        "preskip+value-embed",
        "preskip and the tables of value-embed beside it, so more weights",
        build=lambda planner: planner.value_embed(branch=True),
        budget="larger",
    ),
    *_peer(
        "nonlinear-q",
        "queries of a small MLP around the identity, with as many weights as their matrix",
        {"nonlinear-q": {}},
    ),
    *_peer("gated-attention", "each head's output passes a gate of its own", {"gated-attention": {}}),
    Arm(
        "content-gated",
        "content behind a gate per token that starts nearly closed",
        2e-3,
        peers=partial(_gated, enrich_attention=False),
    ),
    Arm(
        "preskip-closed",
        "preskip behind a gate per token that starts nearly closed",
        2e-3,
        peers=partial(_gated, enrich_attention=True),
    ),
    Arm("ia3", "IA3: one factor per key, value and inner MLP feature", 1e-2, make_config=_ia3, budget="floor"),
    Arm("layernorm", "the weights of the norms alone", 3e-3, make_config=_layer_norms, budget="floor"),
    Arm("bitfit", "the biases alone", 3e-3, own_weights=bias_names, budget="floor"),
    Arm("full", "full fine-tuning: every weight of the model", 3e-5, own_weights=_all_parameters, budget="ceiling"),
)
# Inserted into a frozen base, and trained from scratch.
ARMS = {arm.name: arm for arm in REGISTRY if arm.build is None or arm.is_inserted}
SCRATCH_ARMS = {arm.name: arm for arm in REGISTRY if arm.build is not None}


def resolve_arms(names: Sequence[str], among: Mapping[str, Arm] = ARMS) -> list[Arm]:
    """Arms by name, in the given order, `none` first.

    Args:
        names: of different arms.
        among: `ARMS` or `SCRATCH_ARMS`.

    Raises:
        PreskipError: an unknown name, a name twice, or none at all.
    """
    unknown = [name for name in names if name not in among]
    if unknown:
        raise PreskipError(f"unknown arm {unknown[0]!r}: choose from {', '.join(among)}")
    if not names or len(set(names)) != len(names):
        raise PreskipError("--arms needs one or more different arms")
    return [among[name] for name in sorted(names, key=lambda name: name != "none")]
