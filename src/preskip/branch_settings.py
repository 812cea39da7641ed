"""What one branch is made of, and what it costs; importable in no time, since the command line shows its fields."""

from __future__ import annotations

from dataclasses import dataclass, fields

from preskip.errors import PreskipError
from preskip.fields import about, allowed, is_allowed, option

ACTIVATIONS = ("silu", "gelu", "relu", "mish")
INITS = ("identity", "paper")
# The skip joins attention's output, or the residual stream behind a norm of that output where a block has one.
SKIP_POSITIONS = ("attention", "residual")
# `layers_to_transform` and `--layers`: every layer that has attention.
ATTENTION_LAYERS = "attention"
BRANCH = "Branch"


@dataclass(frozen=True, kw_only=True)
class BranchSettings:
    """What one branch is made of; the fields of `PreskipConfig` that concern the arithmetic (`preskip.branch`).

    With enrich_attention=False and content_skip=False, W_down · σ(W_up · x̂) itself joins attention's output: a parallel
    adapter (He et al. 2022, arXiv 2110.04366). init_weights="identity" starts with W_down = 0 and W_skip = 0, so that
    the model is exactly as it was; "paper" with W_up, W_down ~ N(0, init_std²) and W_skip ~ N(0, skip_init_std²).

    Raises:
        PreskipError: a value is out of range or two fields contradict each other.
    """

    expansion: float = option(1.25, "Inner width over the model's width.", BRANCH, above=0, most=64)
    activation: str = option("silu", "silu (paper), gelu, relu or mish.", BRANCH, choices=ACTIVATIONS)
    gated: bool = option(False, "SwiGLU-like pre-projection, with one more matrix.", BRANCH)
    dropout: float = option(0.0, "Probability of dropping an inner feature while training.", BRANCH, least=0, below=1)
    preprojection: bool = option(True, "With or without pre-projection.", BRANCH)
    content_skip: bool = option(True, "With or without content skip.", BRANCH)
    enrich_attention: bool = option(True, "Whether attention reads the enriched input; the skip does anyway.", BRANCH)
    skip_rank: int | None = option(
        None,
        "Rank of the skip. Default: full.",
        BRANCH,
        least=1,
        allowed="it must be a positive integer, or None for a full d x d skip",
    )
    init_weights: str = option("identity", "identity or paper.", BRANCH, choices=INITS)
    # With W_down = 0 as well, W_up = 0 would keep both gradients at 0 for ever.
    init_std: float = option(0.01, "Standard deviation of W_up (and, with paper, of W_down).", BRANCH, above=0)
    skip_init_std: float = option(1e-4, "Standard deviation of W_skip with paper.", BRANCH, least=0)

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, words: str) -> None:
            if not ok:
                raise PreskipError(f"{name}={getattr(self, name)!r} is not possible: {words}")

        for name, what in about(type(self)).items():
            require(is_allowed(getattr(self, name), what), name, allowed(what))
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
