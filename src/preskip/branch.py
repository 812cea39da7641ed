"""The method itself: the arithmetic of one pre-projection + content-skip branch, its initialisation and its cost.

Shinde, "Position-Agnostic Pre-Projection for Transformer Attention" (arXiv 2604.10791). With x̂ the normed
input of a block's attention and d its width::

    x̃     = x̂ + W_down · σ(W_up · x̂)      pre-projection, W_up: d → ⌊e·d⌋, W_down: ⌊e·d⌋ → d, no biases
    q,k,v = W_Q x̃, W_K x̃, W_V x̃           as before, positions enter only here
    out   = Attention(q, k, v) + W_skip · x̃   content skip, W_skip: d → d, no bias

Everything acts on one token at a time and before any position is known, so the K/V cache keeps its size.
Shapes below: B batch, T tokens, d width, f = ⌊e·d⌋ inner width, r rank of a low-rank skip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F

from preskip.errors import PreskipError

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "mish": F.mish,
}
INITS = ("identity", "paper")
PARTS = ("up", "gate", "down", "skip", "skip_down", "skip_up")


@dataclass(frozen=True, kw_only=True)
class BranchSettings:
    """What one branch is made of; the fields of `PreskipConfig` that concern the arithmetic.

    Args:
        expansion: inner width over d, > 0. Default 1.25 (paper).
        activation: one of silu (paper), gelu, relu, mish.
        gated: SwiGLU-like inner layer, W_down(σ(W_gate x̂) ⊙ W_up x̂), with one more d → f matrix.
        dropout: probability of dropping an inner feature while training, in [0, 1).
        preprojection: False leaves x̃ = x̂: the linear skip alone.
        content_skip: False leaves the skip out: the pre-projection alone.
        enrich_attention: False lets attention read x̂ as before, and only the skip carries x̃; with content_skip=False
            as well, W_down · σ(W_up · x̂) itself joins attention's output: a parallel adapter (He et al. 2022,
            arXiv 2110.04366).
        skip_rank: None for a full d × d skip, an int for W_skip = W_skip_up · W_skip_down of that rank.
        init_weights: "identity" (W_down = 0, W_skip = 0: the model starts exactly as it was) or "paper"
            (W_up, W_down ~ N(0, init_std²), W_skip ~ N(0, skip_init_std²)).
        init_std, skip_init_std: standard deviations of the paper's initialisation, > 0 and >= 0. W_up takes init_std
            in both.

    Raises:
        PreskipError: a value is out of range or two fields contradict each other.
    """

    expansion: float = 1.25
    activation: str = "silu"
    gated: bool = False
    dropout: float = 0.0
    preprojection: bool = True
    content_skip: bool = True
    enrich_attention: bool = True
    skip_rank: int | None = None
    init_weights: str = "identity"
    init_std: float = 0.01
    skip_init_std: float = 1e-4

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, allowed: str) -> None:
            if not ok:
                raise PreskipError(f"{name}={getattr(self, name)!r} is not possible: {allowed}")

        require(_is_number(self.expansion) and 0 < self.expansion <= 64, "expansion", "it must be > 0 and <= 64")
        require(self.activation in tuple(ACTIVATIONS), "activation", f"choose one of {', '.join(ACTIVATIONS)}")
        require(self.init_weights in INITS, "init_weights", f"choose one of {', '.join(INITS)}")
        for name in ("gated", "preprojection", "content_skip", "enrich_attention"):
            require(isinstance(getattr(self, name), bool), name, "choose True or False")
        require(_is_number(self.dropout) and 0 <= self.dropout < 1, "dropout", "it must be in [0, 1)")
        # With W_down = 0 as well, W_up = 0 would keep both gradients at 0 for ever.
        require(_is_number(self.init_std) and self.init_std > 0, "init_std", "it must be > 0")
        require(_is_number(self.skip_init_std) and self.skip_init_std >= 0, "skip_init_std", "it must be >= 0")
        rank_is_valid = self.skip_rank is None or (type(self.skip_rank) is int and self.skip_rank > 0)
        require(rank_is_valid, "skip_rank", "it must be a positive integer, or None for a full d x d skip")
        require(self.preprojection or self.content_skip, "content_skip", "without preprojection nothing is left")
        require(self.preprojection or not self.gated, "gated", "it needs preprojection=True")
        require(self.content_skip or self.skip_rank is None, "skip_rank", "it needs content_skip=True")
        require(self.enrich_attention or self.preprojection, "enrich_attention", "False needs preprojection=True")

    @classmethod
    def from_object(cls, source: object, prefix: str = "") -> BranchSettings:
        """Take the fields of this class from any object that has them (a `PreskipConfig`, a model config)."""
        return cls(**{field.name: getattr(source, prefix + field.name) for field in fields(cls)})

    def shapes(self, d: int) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of each matrix of a branch of width d, by part name.

        Raises:
            PreskipError: ⌊expansion · d⌋ is 0, or skip_rank exceeds d.
        """
        inner = int(d * self.expansion)
        if self.preprojection and inner < 1:
            raise PreskipError(f"expansion={self.expansion} gives no inner feature at width {d}: raise it")
        if self.skip_rank is not None and self.skip_rank > d:
            raise PreskipError(f"skip_rank={self.skip_rank} exceeds the width {d}: lower it, or None for a full skip")
        shapes = {}
        if self.preprojection:
            shapes["up"] = (d, inner)
            if self.gated:
                shapes["gate"] = (d, inner)
            shapes["down"] = (inner, d)
        if self.content_skip and self.skip_rank is None:
            shapes["skip"] = (d, d)
        elif self.skip_rank is not None:
            shapes["skip_down"], shapes["skip_up"] = (d, self.skip_rank), (self.skip_rank, d)
        return shapes

    def cost(self, d: int) -> BranchCost:
        """Cost of one branch of width d without building it; at e = 1.25 with skip 3.5·d² parameters."""
        parameters = sum(a * b for a, b in self.shapes(d).values())
        return BranchCost(parameters=parameters, flops_per_token=2 * parameters, weight_bytes=4 * parameters)


@dataclass(frozen=True, kw_only=True)
class BranchCost:
    """What one branch costs: trainable parameters, forward FLOPs per token (2 per multiply-add), bytes of weights."""

    parameters: int
    flops_per_token: int
    weight_bytes: int


def enrich(
    x: torch.Tensor, linears: Mapping[str, nn.Module], settings: BranchSettings, dropout: nn.Module | None = None
) -> torch.Tensor:
    """x̃ = x̂ + W_down · σ(W_up · x̂), [B, T, d] → [B, T, d] in the dtype of x; see `feature` for the arguments.

    The sum is taken in the wider of both dtypes and rounded once. Without a pre-projection, x̃ = x̂.
    """
    return (x + feature(x, linears, settings, dropout)).to(x.dtype) if "down" in linears else x


def feature(
    x: torch.Tensor, linears: Mapping[str, nn.Module], settings: BranchSettings, dropout: nn.Module | None = None
) -> torch.Tensor:
    """W_down · σ(W_up · x̂), [B, T, d] → [B, T, d] in the weights' dtype, or in autocast's.

    Args:
        x: x̂, the normed input of attention.
        linears: the branch's matrices by part name.
        settings: names the activation.
        dropout: applied to the inner features [B, T, f], or None.
    """
    z = cast_in(x, linears["down"])
    inner = ACTIVATIONS[settings.activation](linears["gate" if "gate" in linears else "up"](z))
    if "gate" in linears:
        inner = inner * linears["up"](z)
    if dropout is not None:
        inner = dropout(inner)
    return linears["down"](inner)


def content(
    attention_input: torch.Tensor,
    linears: Mapping[str, nn.Module],
    settings: BranchSettings,
    dropout: nn.Module | None = None,
) -> torch.Tensor | None:
    """What goes around attention, [B, T, d] in the dtype of its input, or None.

    Args:
        attention_input: what attention reads, [B, T, d]: x̃, or x̂ where `enrich_attention` is off.
        linears: the branch's matrices by part name.
        settings: which parts there are.
        dropout: see `feature`.

    Returns:
        W_skip · x̃; without content skip None, or W_down · σ(W_up · x̂) if it does not feed attention either.
    """
    if settings.content_skip:
        enriched = attention_input
        if not settings.enrich_attention:
            enriched = enrich(attention_input, linears, settings, dropout)
        return skip(enriched, linears)
    if settings.enrich_attention:
        return None
    return feature(attention_input, linears, settings, dropout).to(attention_input.dtype)


def skip(enriched: torch.Tensor, linears: Mapping[str, nn.Module]) -> torch.Tensor:
    """W_skip · x̃, full or low-rank, [B, T, d] → [B, T, d] in the dtype of x̃."""
    if "skip" in linears:
        return linears["skip"](cast_in(enriched, linears["skip"])).to(enriched.dtype)
    return linears["skip_up"](linears["skip_down"](cast_in(enriched, linears["skip_down"]))).to(enriched.dtype)


def cast_in(x: torch.Tensor, linear: nn.Module) -> torch.Tensor:
    """Bring activations to the weights' dtype, or leave them to autocast where that is on."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(linear.weight.dtype)  # type: ignore[arg-type]


@torch.no_grad()
def initialise(part: str, weight: torch.Tensor, settings: BranchSettings) -> None:
    """Fill one weight matrix [out, in] in place, as `settings.init_weights` says (`BranchSettings`).

    A low-rank skip starts with W_skip_down ~ N(0, 1/d) and W_skip_up = 0, or, for the paper's initialisation, with
    W_skip_up scaled so that the product's entries have standard deviation `skip_init_std`.
    """
    identity = settings.init_weights == "identity"
    if part in ("up", "gate"):
        weight.normal_(0.0, settings.init_std)
    elif part == "skip_down":
        weight.normal_(0.0, 1.0 / math.sqrt(weight.shape[1]))
    elif identity:
        weight.zero_()
    elif part == "down":
        weight.normal_(0.0, settings.init_std)
    elif part == "skip":
        weight.normal_(0.0, settings.skip_init_std)
    else:
        d, rank = weight.shape
        weight.normal_(0.0, settings.skip_init_std * math.sqrt(d / rank))


class PreskipBranch(nn.Module):
    """One branch with one set of fp32 weights: `PreskipBranch(d)(x̂) -> (x̃, skip)`.

    Args:
        d: width of the attention's input.
        settings: what the branch is made of, or None to give the fields of `BranchSettings` as keywords.
        device: where to allocate.

    Weights are fp32 whatever the activations are, because at |w| ≈ 0.01 a bf16 weight does not move at lr 1e-5; the
    forward casts in and out, except under autocast, which chooses the dtype itself. Children are named up, gate,
    down, skip (or skip_down, skip_up), each an `nn.Linear` without bias.
    """

    def __init__(
        self,
        d: int,
        settings: BranchSettings | None = None,
        *,
        device: torch.device | str | None = None,
        **kwargs,
    ) -> None:
        super().__init__()
        if settings is not None and kwargs:
            raise PreskipError("give either settings or its fields as keywords, not both")
        try:
            self.settings = settings if settings is not None else BranchSettings(**kwargs)
        except TypeError as error:
            raise PreskipError(f"unknown field of a branch: {error}") from None
        self.d = d
        for part, (in_features, out_features) in self.settings.shapes(d).items():
            linear = nn.Linear(in_features, out_features, bias=False, device="meta", dtype=torch.float32)
            linear.to_empty(device=device or torch.get_default_device())
            self.add_module(part, linear)
        use_dropout = self.settings.preprojection and self.settings.dropout > 0
        self.dropout = nn.Dropout(self.settings.dropout) if use_dropout else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all weights again, as the settings say."""
        for part, linear in self.linears.items():
            initialise(part, linear.weight, self.settings)

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The weight matrices by part name, in a fixed order."""
        return {part: self._modules[part] for part in PARTS if part in self._modules}  # type: ignore[misc]

    def enrich(self, x: torch.Tensor) -> torch.Tensor:
        """What attention reads, [B, T, d] → [B, T, d] in the dtype of x: x̃, or x̂ where `enrich_attention` is off."""
        return enrich(x, self.linears, self.settings, self.dropout) if self.settings.enrich_attention else x

    def content(self, attention_input: torch.Tensor) -> torch.Tensor | None:
        """What goes around attention, from what `enrich` returned; see `preskip.branch.content`."""
        return content(attention_input, self.linears, self.settings, self.dropout)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x̂ [B, T, d] → (what attention reads, what goes around it or None), both [B, T, d] in the dtype of x."""
        attention_input = self.enrich(x)
        return attention_input, self.content(attention_input)

    def cost(self) -> BranchCost:
        """Parameters, forward FLOPs per token and weight bytes of this branch, counted from its own weights."""
        parameters = sum(linear.weight.numel() for linear in self.linears.values())
        weight_bytes = sum(linear.weight.numel() * linear.weight.element_size() for linear in self.linears.values())
        return BranchCost(parameters=parameters, flops_per_token=2 * parameters, weight_bytes=weight_bytes)

    def extra_repr(self) -> str:
        """Width and settings, for `print(model)`."""
        return f"d={self.d}, {self.settings}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
