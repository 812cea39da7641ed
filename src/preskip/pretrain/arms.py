"""What can be trained from scratch side by side, and how its size or its compute is matched to the arm preskip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from preskip.architecture import architecture
from preskip.architecture.config import with_branch
from preskip.branch import BranchSettings
from preskip.errors import PreskipError
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.pretrain.shape import plain_config, tokenizer_fields
from preskip.train.speed import TRAINING_FACTOR, embedding_parameters, forward_flops_per_token


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a model is and costs.

    Attributes:
        parameters: weights, tied ones once.
        non_embedding: without token and position embeddings (an untied output head counts).
        flops_per_token: forward FLOPs per token (`forward_flops_per_token`).
    """

    parameters: int
    non_embedding: int
    flops_per_token: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One arm, solved: what is built and how long it is trained.

    Attributes:
        name: of the arm.
        description: one sentence.
        config: the architecture.
        size: what it costs.
        steps: optimiser steps.
        tokens: training tokens.
        matched: what the arm has in common with preskip: "parameters", "training FLOPs", or None.
        deviation: relative difference from preskip in what is matched; None where nothing is.
    """

    name: str
    description: str
    config: PreTrainedConfig
    size: Size
    steps: int
    tokens: int
    matched: str | None
    deviation: float | None

    @property
    def mlp_width(self) -> int:
        """Inner width of the MLP."""
        width = getattr(self.config, _width_field(self.config))
        return 4 * self.config.hidden_size if width is None else width  # GPT-2's default

    @property
    def training_flops(self) -> int:
        """FLOPs of the whole training, forward and backward."""
        return TRAINING_FACTOR * self.size.flops_per_token * self.tokens

    def facts(self, config: PretrainConfig, attn_implementation: str, compute_dtype: str) -> dict[str, Any]:
        """The arm as run.json describes it."""
        return {
            "description": self.description,
            "budget": "matched" if self.matched else "smaller",
            "matched": self.matched,
            "deviation": self.deviation,
            **asdict(self.size),
            "forward_flops_per_token": self.size.flops_per_token,
            "steps": self.steps,
            "tokens": self.tokens,
            "training_flops": self.training_flops,
            "learning_rate": config.rate(self.name),
            "base_dtype": "float32",
            "adapter_dtype": "float32",
            "compute_dtype": compute_dtype,
            "attn_implementation": attn_implementation,
            "hidden_size": self.config.hidden_size,
            "layers": self.config.num_hidden_layers,
            "mlp_width": self.mlp_width,
        }


def measure(config: PreTrainedConfig, seq_len: int) -> Size:
    """Count a model's weights and FLOPs without allocating it."""
    model = on_meta(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    return Size(
        parameters=total,
        non_embedding=total - embedding_parameters(model),
        flops_per_token=forward_flops_per_token(model, seq_len),
    )


def on_meta(config: PreTrainedConfig) -> nn.Module:
    """The model of a config on the meta device: shapes without memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def branch_config(plain: PreTrainedConfig, settings: BranchSettings, skip_position: str) -> PreTrainedConfig:
    """The config of `preskip_<type>` for a plain one.

    Raises:
        PreskipError: the type has no such architecture, or the settings do not fit it.
    """
    kind = architecture(plain.model_type).config
    return with_branch(kind, plain, settings, preskip_skip_position=skip_position)


class _Planner:
    """What all arms of a run are made from: the plain architecture, and the size of preskip."""

    def __init__(self, config: PretrainConfig, tokenizer: Any) -> None:
        self.config, self.fields = config, tokenizer_fields(tokenizer)
        self.plain = self.changed()
        self.target = self.size(self.branch(config.settings))

    def size(self, config: PreTrainedConfig) -> Size:
        return measure(config, self.config.seq_len)

    def changed(self, **changes: Any) -> PreTrainedConfig:
        return plain_config(
            self.config.arch,
            {**self.config.overrides, **changes},
            self.fields,
            own_vocabulary=self.config.tokenizer is not None,
        )

    def branch(self, settings: BranchSettings) -> PreTrainedConfig:
        return branch_config(self.plain, settings, self.config.skip_position)

    def altered(self, **changes: Any) -> PreTrainedConfig:
        """The branch with other parts, as wide as preskip's weights allow."""
        settings, d = replace(self.config.settings, **changes), self.plain.hidden_size

        def with_inner(inner: int) -> BranchSettings:
            # Half a feature more than wanted, so that rounding ⌊expansion · d⌋ gives `inner` whatever the floats do.
            return replace(settings, expansion=(inner + 0.5) / d)

        one, two = (with_inner(inner).cost(d).parameters for inner in (1, 2))
        budget = self.config.settings.cost(d).parameters
        return self.branch(with_inner(max(1, round(1 + (budget - one) / (two - one)))))

    def wider(self) -> PreTrainedConfig:
        """The plain model with an MLP so wide that the weights come nearest to preskip's."""
        field = _width_field(self.plain)
        width = getattr(self.plain, field) or 4 * self.plain.hidden_size
        count = self.size(self.plain).parameters
        per_feature = self.size(self.changed(**{field: width + 1})).parameters - count
        return self.changed(**{field: width + round((self.target.parameters - count) / per_feature)})

    def deeper(self) -> PreTrainedConfig:
        """The plain model with as many layers as come nearest to preskip's weights."""
        layers, count = self.plain.num_hidden_layers, self.size(self.plain).parameters
        per_layer = self.size(self.changed(num_hidden_layers=layers + 1)).parameters - count
        return self.changed(num_hidden_layers=layers + max(1, round((self.target.parameters - count) / per_layer)))

    def base_steps(self) -> int:
        """Steps of the plain model that cost as many FLOPs as preskip's training."""
        return round(self.config.steps * self.target.flops_per_token / self.size(self.plain).flops_per_token)


@dataclass(frozen=True, kw_only=True)
class ScratchArm:
    """One thing to train.

    Attributes:
        description: one sentence.
        build: the architecture.
        matched: see `Plan`.
    """

    description: str
    build: Callable[[_Planner], PreTrainedConfig]
    matched: str | None = "parameters"


ARMS: dict[str, ScratchArm] = {
    "base": ScratchArm(description="the architecture as it is", build=lambda planner: planner.plain, matched=None),
    "base-wide": ScratchArm(
        description="the MLP widened until the model has as many weights as preskip", build=_Planner.wider
    ),
    "base-deep": ScratchArm(
        description="layers added until the model comes nearest to preskip's weights", build=_Planner.deeper
    ),
    "base-flops": ScratchArm(
        description="the architecture as it is, trained on as many more tokens as preskip's FLOPs pay for",
        build=lambda planner: planner.plain,
        matched="training FLOPs",
    ),
    "skip": ScratchArm(
        description="linear content skip alone; it cannot be widened, so it has fewer weights",
        build=lambda planner: planner.branch(
            replace(planner.config.settings, preprojection=False, gated=False, enrich_attention=True, content_skip=True)
        ),
        matched=None,
    ),
    "preproj": ScratchArm(
        description="pre-projection alone, wider to match",
        build=lambda planner: planner.altered(content_skip=False, skip_rank=None, enrich_attention=True),
    ),
    "preskip": ScratchArm(
        description="pre-projection before Q/K/V and content skip around attention",
        build=lambda planner: planner.branch(planner.config.settings),
    ),
    "parallel": ScratchArm(
        description="parallel adapter: the features join attention's output and never feed Q/K/V, wider to match",
        build=lambda planner: planner.altered(
            enrich_attention=False, content_skip=False, skip_rank=None, preprojection=True
        ),
    ),
}


def plan_arms(config: PretrainConfig, tokenizer: Any) -> dict[str, Plan]:
    """Solve every arm of a run.

    Args:
        config: every option.
        tokenizer: of all arms.

    Raises:
        PreskipError: an architecture that cannot be built; the arm is named.
    """
    planner = _Planner(config, tokenizer)
    plans = {}
    for name in config.arms:
        arm = ARMS[name]
        try:
            built = arm.build(planner)
            size = planner.size(built)
        except PreskipError as error:
            raise PreskipError(f"arm {name}: {error}") from None
        steps = planner.base_steps() if name == "base-flops" else config.steps
        deviation = None
        if arm.matched == "parameters":
            deviation = size.parameters / planner.target.parameters - 1
        elif arm.matched:
            deviation = size.flops_per_token * steps / (planner.target.flops_per_token * config.steps) - 1
        plans[name] = Plan(
            name=name,
            description=arm.description,
            config=built,
            size=size,
            steps=steps,
            tokens=steps * config.tokens_per_step,
            matched=arm.matched,
            deviation=deviation,
        )
    return plans


def _width_field(config: PreTrainedConfig) -> str:
    """Name of the field that holds the MLP's width."""
    for field in ("intermediate_size", "n_inner"):
        if hasattr(config, field):
            return field
    raise PreskipError(f"the MLP of a {config.model_type} has no width that could be changed: leave base-wide out")
