"""Canon layers: each token is mixed with the three before it, channel by channel.

Allen-Zhu, "Physics of Language Models: Part 4.1, Architecture Design and the Magic of Canon Layers" (arXiv 2512.17351),
and its code (facebookresearch/PhysicsLM4, huggingface/canon_helper.py), at four places of a block::

    h'_t = h_t + Σ_{k<4} w_k ⊙ h_{t−k}          no bias, no activation; w_k has a weight per channel

    A: on x̂, the normed input of attention       B: on q, k and v, before positions enter
    C: on the normed input of the MLP             D: on the MLP's features (gate and up) before the activation

From scratch w ~ U(±1/2), torch's default for a convolution of width 4; on a frozen model w = 0. The code mixes packed
documents with each other; here a token is never mixed across a document's border, nor with padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from preskip.attach import hidden_states_of, with_hidden_states
from preskip.casting import is_transformed
from preskip.errors import PreskipError
from preskip.peers.place import PeerModule, Place
from preskip.peers.tokens import REACH, Tokens
from preskip.sites import input_width

# Where transformers' blocks have them: apart, or in one matrix.
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query_key_value",), ("qkv_proj",), ("c_attn",))
FEATURES = (("gate_proj", "up_proj"), ("gate_up_proj",), ("dense_h_to_4h",), ("c_fc",))


def causal_mix(whole: torch.Tensor, weight: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
    """h'_t = h_t + Σ_{k<4} w_k ⊙ h_{t−k}, [B, T, C] in the wider of both dtypes.

    Args:
        whole: h with the `REACH` tokens in front of it [B, REACH + T, C].
        weight: w_k as rows [4, C].
        kept: for k = 1, 2, 3 whether a token is mixed with the k-th before it, 1 or 0 [B or 1, T, 1].
    """
    whole = whole.to(torch.promote_types(whole.dtype, weight.dtype))
    mixed = torch.addcmul(_earlier(whole, 0), _earlier(whole, 0), weight[0])
    for back, is_kept in enumerate(kept, start=1):
        mixed = torch.addcmul(mixed, _earlier(whole, back) * is_kept, weight[back])
    return mixed


def _earlier(whole: torch.Tensor, back: int) -> torch.Tensor:
    """h_{t−k}, a view."""
    return whole[:, REACH - back : whole.shape[1] - back]


def _stored(gradient: torch.Tensor) -> torch.Tensor:
    """The same values [B, T, C], in memory once they are computed.

    torch's inductor would fuse what lies behind them into each of its four readers, and so compute it four times, an
    exponential of the MLP's activation included. What is viewed by strides it stores first.
    """
    if not torch.compiler.is_compiling():
        return gradient
    _, tokens, channels = gradient.shape
    return gradient.contiguous().as_strided(gradient.shape, (tokens * channels, channels, 1))


class _Mix(torch.autograd.Function):
    """`causal_mix`, whose backward pass reads and writes half of what autograd's does, and which keeps the input alone.

    Forward and backward on one core, at widths of 128 to 576: 0.5 to 0.7 of the time of autograd's, and no more than
    that of torch's depthwise convolution, which cannot stop at a document's border. Compiled see `_stored`.
    """

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, weight: torch.Tensor, *kept: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(whole, weight, *kept)
        return causal_mix(whole, weight, *kept)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """∂/∂h_{t−k} is ∂/∂h'_t ⊙ w_k where t is mixed with it, ∂/∂w_k the sum over t of ∂/∂h'_t ⊙ h_{t−k}."""
        whole, weight, *kept = ctx.saved_tensors
        gradient = _stored(gradients[0])
        dtype, whole = whole.dtype, whole.to(gradient.dtype)
        of_whole = torch.zeros(whole.shape, dtype=gradient.dtype, device=gradient.device)
        _earlier(of_whole, 0).copy_(torch.addcmul(gradient, gradient, weight[0]))
        of_weight = [(gradient * _earlier(whole, 0)).sum((0, 1))]
        for back, is_kept in enumerate(kept, start=1):
            reaching = gradient * is_kept
            _earlier(of_whole, back).addcmul_(reaching, weight[back])
            of_weight.append((reaching * _earlier(whole, back)).sum((0, 1)))
        return of_whole.to(dtype), torch.stack(of_weight).to(weight.dtype), *(None for _ in kept)


class CausalMix(PeerModule):
    """h'_t = h_t + Σ_{k<4} w_k ⊙ h_{t−k}, [B, T, C] → [B, T, C] in the dtype of h.

    Args:
        width: number C of channels.
        tokens: says which tokens belong together.
        name: of this module among those of its model.
        identity: start at w = 0.

    The weight is [4, C]: row k is w_k, so that neighbouring channels lie side by side. A convolution of torch stores
    [C, 1, 4] in the other order.
    """

    def __init__(self, width: int, tokens: Tokens, name: str, *, identity: bool) -> None:
        super().__init__()
        self.tokens, self.name, self.identity = tokens, name, identity
        self.weight = nn.Parameter(torch.empty(REACH + 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See `PeerModule`."""
        if self.identity:
            nn.init.zeros_(self.weight)
        else:
            nn.init.uniform_(self.weight, -0.5, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """h → h'; the sum is taken in the wider of both dtypes."""
        whole = self.tokens.before(self.name, x)
        reach = self.tokens.reach().to(x.device)[..., None]
        kept = [(reach >= back).to(self.weight.dtype) for back in range(1, REACH + 1)]
        if is_transformed():  # torch.func has no rule for the other
            mixed = causal_mix(whole, self.weight, *kept)
        else:
            mixed = _Mix.apply(whole, self.weight, *kept)
        return mixed.to(x.dtype)

    def on_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook: the module reads h' in place of h."""
        return with_hidden_states(args, kwargs, self(hidden_states_of(args, kwargs)))

    def on_output(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Forward hook: h' in place of what the module gives."""
        return self(output)


def canon(place: Place, sites: str) -> dict[str, PeerModule]:
    """Put Canon layers into a block.

    Args:
        place: the block.
        sites: letters of the places, of ABCD.

    Raises:
        PreskipError: the block has no projections or MLP of a known form.
    """
    mixes: dict[str, PeerModule] = {}

    def mix(name: str, width: int) -> CausalMix:
        mixes[name] = made = CausalMix(width, place.tokens, f"{place.layer}.{name}", identity=place.identity)
        return made

    def before(module: nn.Module, made: CausalMix) -> None:
        # In front of a branch's hook: the branch reads what Canon gives.
        made.handles.append(module.register_forward_pre_hook(made.on_input, with_kwargs=True, prepend=True))

    width = input_width(place.attention, place.config.hidden_size)
    if "A" in sites:
        before(place.attention, mix("a", width))
    if "B" in sites:
        for name, linear in _linears(place.attention, PROJECTIONS).items():
            made = mix(f"b_{name}", _outputs(linear))
            made.hook_child(place.tokens, place.attention, name, made.on_output)
    if "C" in sites or "D" in sites:
        mlp = getattr(place.block, "mlp", None) or nn.Module()
        features = _linears(mlp, FEATURES)
        if "C" in sites:
            before(mlp, mix("c", width))
        for name, linear in features.items() if "D" in sites else ():
            made = mix(f"d_{name}", _outputs(linear))
            made.hook_child(place.tokens, mlp, name, made.on_output)
    return mixes


def _linears(module: nn.Module, forms: tuple[tuple[str, ...], ...]) -> dict[str, nn.Module]:
    for names in forms:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            return {name: getattr(module, name) for name in names}
    known = ", ".join(name for names in forms for name in names)
    raise PreskipError(f"{type(module).__name__} has none of {known}: Canon layers cannot be put there")


def _outputs(linear: Any) -> int:
    return linear.out_features if hasattr(linear, "out_features") else linear.nf  # GPT-2's Conv1D
