"""`PreskipLayer`: the branches of all adapters at one attention module, as a PEFT tuner layer."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from preskip import branch as arithmetic
from preskip.branch import PARTS, BranchSettings, PreskipBranch
from preskip.casting import drop_casts, forget_on_load
from preskip.rows import by_row
from preskip.sites import tensors_of

CANNOT_MERGE = (
    "a Preskip branch depends non-linearly on its input and cannot be merged into the base weights: keep the adapter, "
    "or unload() it"
)


class PreskipLayer(nn.Module, BaseTunerLayer):
    """Child `preskip` of an attention module; it wraps nothing, so it has no base layer.

    Args:
        attention: the module it belongs to (referenced, not owned).
        width: d of the attention's input.
        tap: what `preskip.attach.tap_of` gives (referenced, not owned).

    Several active adapters add up: x̃ = x̂ + Σ features, skip = Σ W_skip · x̃. An adapter with `enrich_attention=False`
    builds its own x̃ on what attention reads.
    """

    adapter_layer_names = PARTS
    other_param_names = ("dropout", "settings")
    # What PEFT's `disable_input_dtype_casting` switches off in other layers; products here choose by themselves.
    cast_input_dtype_enabled = True

    def __init__(self, attention: nn.Module, width: int, tap: nn.Module | None = None) -> None:
        super().__init__()
        self.width = width
        # In lists, so that they are not registered as children.
        self._attention, self._tap = [attention], [tap]
        for part in PARTS:
            self.add_module(part, nn.ModuleDict())
        self.dropout = nn.ModuleDict()
        self.settings: dict[str, BranchSettings] = {}
        # Of the rows of the batch that is being computed, in place of the active adapters.
        self.row_names: list[str] | None = None
        self.merged_adapters: list[str] = []
        self._active_adapter = []
        forget_on_load(self)

    @property
    def tap(self) -> nn.Module | None:
        """What `preskip.attach.tap_of` has given."""
        return self._tap[0]

    def get_base_layer(self) -> nn.Module:
        """Itself: there is no wrapped layer."""
        return self

    def _no_base_weight(self):
        raise AttributeError("a Preskip layer wraps no base layer")

    weight = bias = property(_no_base_weight)

    def update_layer(self, adapter_name: str, settings: BranchSettings, active_adapters: list[str], inference: bool):
        """Add the branch of one adapter, on the attention's device, always in fp32."""
        branch = PreskipBranch(self.width, settings, device=self._branch_device())
        for part, linear in branch.linears.items():
            getattr(self, part)[adapter_name] = linear
        if branch.dropout is not None:
            self.dropout[adapter_name] = branch.dropout
        self.settings[adapter_name] = settings
        self.set_adapter(active_adapters, inference_mode=inference)

    def _branch_device(self) -> torch.device | None:
        # PEFT's low_cpu_mem_usage moves parameters as they are registered; to ask, make one that draws no numbers.
        if nn.LayerNorm(1).weight.is_meta:
            return torch.device("meta")
        return next((t.device for t in tensors_of(self._attention[0]) if t.device.type != "meta"), None)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype]:
        """The attention's device; fp32, whatever the base's dtype (packed weights have no usable one anyway)."""
        own = {id(t) for t in tensors_of(self)}
        devices = (t.device for t in tensors_of(self._attention[0]) if id(t) not in own)
        return next((device for device in devices if device.type != "meta"), None), torch.float32

    def train(self, mode: bool = True) -> PreskipLayer:
        """As `nn.Module.train`; warns where weights are to be trained in 16 bits, in which they hardly move."""
        if mode and arithmetic.trains_in_16_bits(self):
            warnings.warn(
                "the branch's weights were cast to 16 bits and would hardly move at usual learning rates: cast them "
                "back with p.data = p.data.float() before training",
                stacklevel=2,
            )
        return super().train(mode)

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> PreskipLayer:
        moved = super()._apply(fn, recurse)
        drop_casts(self)
        return moved

    def active_names(self) -> list[str]:
        """The adapters that compute here: those that are active and have a branch in this layer."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.settings]

    def linears(self, adapter_name: str) -> dict[str, nn.Linear]:
        """The matrices of one adapter by part name."""
        modules: dict[str, nn.ModuleDict] = {part: getattr(self, part) for part in PARTS}
        return {part: modules[part][adapter_name] for part in PARTS if adapter_name in modules[part]}  # type: ignore

    def _parts(self, name: str) -> tuple[dict[str, nn.Linear], BranchSettings, nn.Module | None]:
        dropout = self.dropout[name] if name in self.dropout else None  # noqa: SIM401
        return self.linears(name), self.settings[name], dropout

    def enrich(self, x: torch.Tensor) -> torch.Tensor:
        """What attention reads, [B, T, d]: x̃ of the active adapters, or of each row's (`preskip.branch.enrich`)."""
        if (names := self._names_of_rows()) is not None:
            return by_row(x, names, self._enrich_rows, x)
        active = [name for name in self.active_names() if self.settings[name].enrich_attention]
        if len(active) <= 1:
            return arithmetic.enrich(x, *self._parts(active[0])) if active else x
        return x + torch.stack([arithmetic.enrich(x, *self._parts(name)) - x for name in active]).sum(0)

    def content(self, attention_input: torch.Tensor) -> torch.Tensor | None:
        """What goes around attention, [B, T, d], summed over the active adapters (`preskip.branch.content`)."""
        if (names := self._names_of_rows()) is not None:
            return by_row(attention_input, names, self._content_rows, torch.zeros_like(attention_input))
        total = None
        for name in self.active_names():
            part = arithmetic.content(attention_input, *self._parts(name))
            if part is not None:
                total = part if total is None else total + part
        return total

    def _names_of_rows(self) -> list[str] | None:
        return None if self.disable_adapters else self.row_names

    def _enrich_rows(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        is_read = name in self.settings and self.settings[name].enrich_attention
        return arithmetic.enrich(x, *self._parts(name)) if is_read else None

    def _content_rows(self, name: str, attention_input: torch.Tensor) -> torch.Tensor | None:
        return arithmetic.content(attention_input, *self._parts(name)) if name in self.settings else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused for its own adapters by name; a no-op when LoRA stacked with it merges its own, or all that it has.

        Raises:
            NotImplementedError: the adapters to merge include one of this layer's.
        """
        if set(adapter_names or ()) & set(self.settings):
            raise NotImplementedError(CANNOT_MERGE)

    def unmerge(self) -> None:
        """Nothing is ever merged."""
