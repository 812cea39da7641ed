"""Arms from scratch, solved: what is built and for how long it trains, its size or compute matched to arm preskip."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from preskip.architecture import architecture
from preskip.architecture.config import with_branch
from preskip.arms.arm import Arm
from preskip.arms.budget import nearest_expansion
from preskip.arms.flops import TRAINING_FACTOR, embedding_parameters, forward_flops_per_token
from preskip.arms.shape import plain_config
from preskip.branch_settings import BranchSettings
from preskip.errors import PreskipError, explained, one_line


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
        budget: see `preskip.arms.arm.Budget`.
        deviation: relative difference from preskip in what is matched; None where nothing is.
    """

    name: str
    description: str
    config: PreTrainedConfig
    size: Size
    steps: int
    tokens: int
    matched: str | None
    budget: str
    deviation: float | None

    @property
    def mlp_width(self) -> int:
        """Inner width of the MLP."""
        return _mlp_width(self.config)

    @property
    def training_flops(self) -> int:
        """FLOPs of the whole training, forward and backward."""
        return TRAINING_FACTOR * self.size.flops_per_token * self.tokens

    @property
    def facts(self) -> Any:
        """The arm as run.json describes it, without how it is trained."""
        return {
            "description": self.description,
            "budget": self.budget,
            "matched": self.matched,
            "deviation": self.deviation,
            **asdict(self.size),
            "forward_flops_per_token": self.size.flops_per_token,
            "steps": self.steps,
            "tokens": self.tokens,
            "training_flops": self.training_flops,
            "hidden_size": self.config.hidden_size,
            "layers": self.config.num_hidden_layers,
            "mlp_width": self.mlp_width,
        }


@dataclass(frozen=True, kw_only=True)
class Planner:
    """What arms from scratch are made from.

    Attributes:
        arch: name of a shape, or path of a `config.json` of a plain model.
        overrides: fields of its config to change.
        fields: what the config takes from the tokenizer (`tokenizer_fields`).
        own_vocabulary: see `plain_config`.
        settings: the branch of the arm preskip; the others are matched to it.
        skip_position: see `PreskipConfig`.
        layers: layer indices that have a branch; None for all.
        seq_len: tokens per training sequence.
        steps: optimiser steps of the arm preskip.
        tokens_per_step: tokens that a step reads.
    """

    arch: str
    overrides: Mapping[str, Any]
    fields: Mapping[str, Any]
    own_vocabulary: bool
    settings: BranchSettings
    skip_position: str
    layers: tuple[int, ...] | None
    seq_len: int
    steps: int
    tokens_per_step: int

    @cached_property
    def plain(self) -> PreTrainedConfig:
        """The architecture without branches."""
        return self._changed()

    @cached_property
    def target(self) -> Size:
        """The size of the arm preskip."""
        return self.size(self.branch())

    def size(self, config: PreTrainedConfig) -> Size:
        """Count a model's weights and FLOPs without allocating it.

        Raises:
            PreskipError: a config that transformers makes no model of.
        """
        with explained(
            lambda error: f"no model can be made of this architecture, check --arch and --set: {one_line(error)}"
        ):
            model = on_meta(config)
        total = sum(parameter.numel() for parameter in model.parameters())
        return Size(
            parameters=total,
            non_embedding=total - embedding_parameters(model),
            flops_per_token=forward_flops_per_token(model, self.seq_len),
        )

    def branch(self, *, match: bool = True, **changes: Any) -> PreTrainedConfig:
        """The architecture with a branch that differs from preskip's in `changes`, as wide as its weights allow.

        Raises:
            PreskipError: the type has no such architecture, or the settings or layers do not fit it.
        """
        settings, d = replace(self.settings, **changes), self.plain.hidden_size
        if match and changes:
            settings = nearest_expansion(settings, self.settings.cost(d).parameters, [d])
        return self._with_branch(self.plain, settings)

    def _with_branch(
        self, plain: PreTrainedConfig, settings: BranchSettings | None = None, **more: Any
    ) -> PreTrainedConfig:
        kind = architecture(self.plain.model_type).config
        layers = None if self.layers is None else list(self.layers)
        values = {"preskip_skip_position": self.skip_position, "preskip_layers": layers, **more}
        return with_branch(kind, plain, settings or self.settings, **values)

    def wider(self) -> PreTrainedConfig:
        """The plain model with an MLP so wide that the weights come nearest to preskip's."""
        return self._widened(lambda config: config)

    def peers(self, peers: Mapping[str, Mapping[str, Any]], *, branch: bool = False) -> PreTrainedConfig:
        """The architecture with peers in every block (`preskip.peers`).

        Args:
            peers: settings by name.
            branch: also with preskip's branch, its expansion so that the weights come nearest to preskip's.

        Raises:
            PreskipError: peers that do not fit the architecture, or leave no weights for the branch.
        """
        if not branch:
            return self._with_branch(self.plain, preskip_layers=[], preskip_peers=peers)
        more = self.size(self.peers(peers)).parameters - self.size(self.plain).parameters
        d, count = self.plain.hidden_size, len(self.layers or range(self.plain.num_hidden_layers))
        settings = nearest_expansion(self.settings, self.settings.cost(d).parameters - more // count, [d])
        return self._with_branch(self.plain, settings, preskip_peers=peers)

    def wider_with(self, peers: Mapping[str, Mapping[str, Any]]) -> PreTrainedConfig:
        """The architecture with peers in every block, its MLP so wide that the weights come nearest to preskip's."""
        return self._widened(lambda config: self._with_branch(config, preskip_layers=[], preskip_peers=peers))

    def value_embed(self, *, branch: bool = False) -> PreTrainedConfig:
        """The architecture with tables of values in every second layer, from the last one on.

        Without the branch it has as many whole tables as the branch has weights for, and the MLP takes the rest.

        Args:
            branch: with preskip's branch, and as many tables.

        Raises:
            PreskipError: one table has more weights than the branch.
        """
        last = self.plain.num_hidden_layers - 1
        count = self.size(self.plain).parameters
        one = self.size(self.peers({"value-embed": {"layers": [last]}})).parameters - count
        budget = self.target.parameters - count
        layers = list(range(last, -1, -2))[: budget // one]
        if not layers:
            raise PreskipError(
                f"one table of values has {one:,} weights, more than the branch's {budget:,}: give fewer tokens with "
                "--vocab-size, or leave the arm out"
            )
        peers = {"value-embed": {"layers": sorted(layers)}}
        return self._with_branch(self.plain, preskip_peers=peers) if branch else self.wider_with(peers)

    def deeper(self) -> PreTrainedConfig:
        """The plain model with as many layers as come nearest to preskip's weights, at least one more."""
        return self._grown("num_hidden_layers", self.plain.num_hidden_layers, lambda config: config, least=1)

    def _widened(self, make: Callable[[PreTrainedConfig], PreTrainedConfig]) -> PreTrainedConfig:
        return self._grown(_width_field(self.plain), _mlp_width(self.plain), make, least=0)

    def _grown(
        self, field: str, value: int, make: Callable[[PreTrainedConfig], PreTrainedConfig], *, least: int
    ) -> PreTrainedConfig:
        """What is made of the plain model with so much more of a field that the weights come nearest to preskip's."""
        count = self.size(make(self.plain)).parameters
        per_unit = self.size(make(self._changed(**{field: value + 1}))).parameters - count
        more = round((self.target.parameters - count) / per_unit)
        return make(self._changed(**{field: value + max(least, more)}))

    def _changed(self, **changes: Any) -> PreTrainedConfig:
        overrides = {**self.overrides, **changes}
        return plain_config(self.arch, overrides, self.fields, own_vocabulary=self.own_vocabulary)

    def plan(self, arm: Arm) -> Plan:
        """Solve an arm that has a `build`.

        Raises:
            PreskipError: an architecture that cannot be built; the arm is named where it is the reason.
        """
        target = self.target
        assert arm.build is not None
        try:
            config = arm.build(self)
            size = self.size(config)
        except PreskipError as error:
            raise PreskipError(f"arm {arm.name}: {error}") from None
        steps = self.steps
        if arm.matches == "training FLOPs":
            steps = round(steps * target.flops_per_token / size.flops_per_token)
            deviation = size.flops_per_token * steps / (target.flops_per_token * self.steps) - 1
        else:
            deviation = size.parameters / target.parameters - 1
        is_matched = arm.budget == "matched"
        return Plan(
            name=arm.name,
            description=arm.description,
            config=config,
            size=size,
            steps=steps,
            tokens=steps * self.tokens_per_step,
            matched=arm.matches if is_matched else None,
            budget=arm.budget,
            deviation=deviation if is_matched else None,
        )


def on_meta(config: PreTrainedConfig, **options: Any) -> nn.Module:
    """The model of a config on the meta device: shapes without memory; `options` are transformers' own."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options)


def _mlp_width(config: PreTrainedConfig) -> int:
    width = getattr(config, _width_field(config))
    return 4 * config.hidden_size if width is None else width  # GPT-2's default


def _width_field(config: PreTrainedConfig) -> str:
    """Name of the field that holds the MLP's width."""
    for field in ("n_inner", "intermediate_size"):
        if hasattr(config, field):
            return field
    raise PreskipError(f"the MLP of a {config.model_type} has no width that could be changed: leave base-wide out")
