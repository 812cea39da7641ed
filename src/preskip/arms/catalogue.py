"""The arms that can be compared, on a frozen base and from scratch, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from preskip.arms.arm import Arm
from preskip.arms.configs import (
    BOTTLENECK,
    THIRD,
    all_parameters,
    branch,
    gated,
    hira,
    ia3,
    late,
    layer_norms,
    lora,
    low_rank,
    preproj_lora,
)
from preskip.arms.modules import bias_names
from preskip.errors import PreskipError

# Arms whose rank is open where nothing is matched.
LORA_ARMS = ("lora", "lora-attention", "lora-mlp", "dora", "rslora", "hira", "preproj+lora")


def _branch_arm(name: str, description: str, *, match: bool = True, decisive: bool = False, **changes: Any) -> Arm:
    """A branch that differs from the reference's in `changes`, on a frozen base and from scratch."""
    return Arm(
        name,
        description,
        5e-4,
        make_config=partial(branch, match=match, **changes),
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
        make_config=partial(lora, arm="lora"),
        decisive=True,
    ),
    Arm(
        "lora-attention",
        "LoRA on the attention's Q, K, V and output projections alone",
        1e-3,
        make_config=partial(lora, arm="lora-attention", part="attention"),
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
        make_config=low_rank,
    ),
    Arm(
        "preskip-lowrank-narrow",
        "preskip with a skip of rank d/8, as wide as in preskip",
        5e-4,
        make_config=partial(low_rank, match=False),
        budget="smaller",
    ),
    Arm(
        "preskip-bottleneck",
        "preskip with an inner width of d/4 and a skip of rank d/8",
        5e-4,
        make_config=partial(low_rank, match=False, preprojection=True, expansion=BOTTLENECK),
        budget="smaller",
    ),
    Arm("preskip-late", "preskip in the last quarter of the adapted layers, wider to match", 5e-4, make_config=late),
    Arm(
        "preskip-late-narrow",
        "preskip in the last quarter of the adapted layers, as wide as in preskip",
        5e-4,
        make_config=partial(late, match=False),
        budget="smaller",
    ),
    Arm(
        "preskip-third-narrow",
        "preskip in the last third of the adapted layers, as wide as in preskip",
        5e-4,
        make_config=partial(late, share=THIRD, match=False),
        budget="smaller",
    ),
    Arm(
        "lora-mlp",
        "LoRA on the linear layers outside attention",
        1e-3,
        make_config=partial(lora, arm="lora-mlp", part="mlp"),
    ),
    Arm(
        "dora",
        "DoRA on all linear layers of the blocks",
        1e-3,
        make_config=partial(lora, arm="dora", use_dora=True),
    ),
    Arm(
        "rslora",
        "rank-stabilised LoRA (scale 16/√rank) on all linear layers of the blocks",
        1e-3,
        make_config=partial(lora, arm="rslora", use_rslora=True),
    ),
    Arm(
        "hira",
        "HiRA (the weight times a low-rank matrix, entry by entry) on all linear layers",
        5e-3,
        make_config=hira,
    ),
    Arm(
        "preproj+lora",
        "pre-projection, and LoRA on attention with the weights that the skip would have had",
        5e-4,
        make_config=preproj_lora,
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
        peers=partial(gated, enrich_attention=False),
    ),
    Arm(
        "preskip-closed",
        "preskip behind a gate per token that starts nearly closed",
        2e-3,
        peers=partial(gated, enrich_attention=True),
    ),
    Arm("ia3", "IA3: one factor per key, value and inner MLP feature", 1e-2, make_config=ia3, budget="floor"),
    Arm("layernorm", "the weights of the norms alone", 3e-3, make_config=layer_norms, budget="floor"),
    Arm("bitfit", "the biases alone", 3e-3, own_weights=bias_names, budget="floor"),
    Arm("full", "full fine-tuning: every weight of the model", 3e-5, own_weights=all_parameters, budget="ceiling"),
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
