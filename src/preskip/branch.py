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
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional as F

from preskip.branch_settings import ACTIVATIONS, BranchCost, BranchSettings
from preskip.casting import drop_casts, forget_on_load, product
from preskip.errors import PreskipError

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {name: getattr(F, name) for name in ACTIVATIONS}
PARTS = ("up", "gate", "down", "skip", "skip_down", "skip_up")


def enrich(
    x: torch.Tensor, linears: Mapping[str, nn.Module], settings: BranchSettings, dropout: nn.Module | None = None
) -> torch.Tensor:
    """x̃ = x̂ + W_down · σ(W_up · x̂), [B, T, d] → [B, T, d] in the dtype of x; see `feature` for the arguments.

    The sum is taken in the wider of both dtypes. Without a pre-projection, x̃ = x̂.
    """
    return (x + feature(x, linears, settings, dropout)).to(x.dtype) if "down" in linears else x


def feature(
    x: torch.Tensor, linears: Mapping[str, nn.Module], settings: BranchSettings, dropout: nn.Module | None = None
) -> torch.Tensor:
    """W_down · σ(W_up · x̂), [B, T, d] → [B, T, d] in the dtype of the products (`preskip.casting.product`).

    Args:
        x: x̂, the normed input of attention.
        linears: the branch's matrices by part name.
        settings: names the activation.
        dropout: applied to the inner features [B, T, f], or None.
    """
    inner = FUNCTIONS[settings.activation](product(x, linears["gate" if "gate" in linears else "up"]))
    if "gate" in linears:
        inner = inner * product(x, linears["up"])
    if dropout is not None:
        inner = dropout(inner)
    return product(inner, linears["down"])


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
        return product(enriched, linears["skip"]).to(enriched.dtype)
    return product(product(enriched, linears["skip_down"]), linears["skip_up"]).to(enriched.dtype)


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


def trains_in_16_bits(branch: nn.Module) -> bool:
    """Whether weights in less than fp32 are to be trained."""
    return any(p.requires_grad and p.dtype.itemsize < 4 for p in branch.parameters())


class PreskipBranch(nn.Module):
    """One branch with one set of fp32 weights: `PreskipBranch(d)(x̂) -> (x̃, skip)`.

    Args:
        d: width of the attention's input.
        settings: what the branch is made of, or None to give the fields of `BranchSettings` as keywords.
        device: where to allocate.

    Weights are fp32 whatever the activations are, because at |w| ≈ 0.01 a bf16 weight does not move at lr 1e-5; they
    compute in the dtype of bf16 activations, by a copy per optimiser step (`preskip.casting`). Children are named up,
    gate, down, skip (or skip_down, skip_up), each an `nn.Linear` without bias.
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
        forget_on_load(self)

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

    def train(self, mode: bool = True) -> PreskipBranch:
        """As `nn.Module.train`; warns where weights are to be trained in 16 bits, in which they hardly move."""
        if mode and trains_in_16_bits(self):
            warnings.warn(
                "the branch's weights are in 16 bits and would hardly move at usual learning rates: load with "
                "dtype=torch.float32, or bake with keep_float32=True",
                stacklevel=2,
            )
        return super().train(mode)

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> PreskipBranch:
        moved = super()._apply(fn, recurse)
        drop_casts(self)
        return moved

    def extra_repr(self) -> str:
        """Width and settings, for `print(model)`."""
        return f"d={self.d}, {self.settings}"
