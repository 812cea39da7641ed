"""Value residual: every layer attends to its own values and to those of the first layer.

Zhou et al., "Value Residual Learning" (ResFormer, arXiv 2410.17897)::

    V_l ← λ₁ V_1 + λ₂ V_l        from the second layer on, before attention

From scratch λ₁ = λ₂ = ½ and fixed, as in the authors' code; on a frozen model both are trained in every layer, from
λ₁ = 0 and λ₂ = 1. The values of a token are mixed with its own of the first layer, so the cache of values is as it was.
"""

from __future__ import annotations

import torch
from torch import nn

from preskip.errors import PreskipError
from preskip.peers.place import PeerModule, Place
from preskip.peers.tokens import Tokens
from preskip.peers.values import Values, values_of


class ValueResidual(PeerModule):
    """V → λ₁ V_1 + λ₂ V, [B, T, W] → [B, T, W]; in the first layer it keeps V_1 and changes nothing.

    Args:
        values: where the block makes them.
        tokens: carries V_1 to the other layers.
        is_first: whether this is the first layer.
        identity: start at λ = (0, 1), trained; otherwise λ = (½, ½), fixed.
    """

    def __init__(self, values: Values, tokens: Tokens, *, is_first: bool, identity: bool) -> None:
        super().__init__()
        self.values, self.tokens, self.is_first = values, tokens, is_first
        self.weight = nn.Parameter(torch.empty(2)) if identity and not is_first else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See `PeerModule`."""
        if self.weight is not None:
            nn.init.zeros_(self.weight)
            nn.init.ones_(self.weight[1:])

    @property
    def flops_per_token(self) -> int:
        """Each λ multiplies a value's W entries."""
        return 0 if self.is_first else 2 * self.values.width

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        """V_l → λ₁ V_1 + λ₂ V_l.

        Raises:
            PreskipError: there is no V_1, or it was computed without gradients and this is not, as under reentrant
                checkpointing.
        """
        first = self.tokens.first_value
        if first is None:
            raise PreskipError("the first layer did not run, so its values are missing")
        if torch.is_grad_enabled() and not self.tokens.first_has_graph:
            raise PreskipError(
                "reentrant gradient checkpointing would lose the gradient of the first layer's values: give "
                "use_reentrant=False"
            )
        first = first.to(own.device)
        return 0.5 * first + 0.5 * own if self.weight is None else self.weight[0] * first + self.weight[1] * own

    def on_output(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Forward hook of the projection.

        Raises:
            PreskipError: the first layer runs a second time in a pass with gradients, which checkpointing would give to
                the values of the wrong run.
        """
        own = self.values.read(output)
        if self.is_first:
            if torch.is_grad_enabled() and self.tokens.is_running and self.tokens.first_value is not None:
                raise PreskipError("the layers run several times in a pass, so no values are the first: leave it out")
            self.tokens.first_value, self.tokens.first_has_graph = own, torch.is_grad_enabled()
            return output
        return self.values.write(output, self(own))


def value_residual(place: Place) -> dict[str, PeerModule]:
    """Put value residual into a block; the first of the chosen ones gives V_1.

    Raises:
        PreskipError: there is no later layer, or it is not known where the attention makes its values.
    """
    if len(place.chosen) < 2:
        raise PreskipError("value residual needs two layers or more: the first one gives its values to the others")
    values = values_of(place)
    made = ValueResidual(values, place.tokens, is_first=place.layer == place.chosen[0], identity=place.identity)
    made.hook_child(place.tokens, place.attention, values.projection, made.on_output)
    return {"mix": made}
