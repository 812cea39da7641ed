"""The branches of a live model, whether an adapter put them there or the model was built with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from preskip.adapter import base_model
from preskip.adapter.layer import PreskipLayer
from preskip.attach import CHILD, POST_ATTENTION_NORMS, tap_of
from preskip.branch import BranchSettings, PreskipBranch
from preskip.errors import PreskipError
from preskip.optimizing import is_optimized
from preskip.quantizing import float_weight
from preskip.sites import AttentionSite, site_of

PARTS = ("skip", "enrichment")

Branch = PreskipLayer | PreskipBranch


@dataclass(frozen=True, kw_only=True)
class LiveBranch:
    """One branch where it sits.

    Attributes:
        site: the attention's place.
        attention: the attention module.
        block: the block that holds it.
        module: the branch itself, child of the attention.
        tap: the module whose output the skip joins, or None for the attention's own output.
    """

    site: AttentionSite
    attention: nn.Module
    block: nn.Module
    module: Branch
    tap: nn.Module | None

    @property
    def layer(self) -> int:
        """Index of the block in its stack."""
        return self.site.layer

    @property
    def parts(self) -> list[str]:
        """Which of `PARTS` are on."""
        return parts_of(self.module)

    def active(self) -> list[tuple[BranchSettings, dict[str, nn.Linear]]]:
        """Settings and matrices of each active adapter; a model's own branch counts as one."""
        if isinstance(self.module, PreskipBranch):
            return [(self.module.settings, self.module.linears)]
        return [(self.module.settings[name], self.module.linears(name)) for name in self.module.active_names()]

    @property
    def post_norm(self) -> nn.Module | None:
        """The norm that attention's output and the skip pass together before the residual sum (Gemma), or None."""
        name = POST_ATTENTION_NORMS.get(type(self.block).__name__)
        return getattr(self.block, name) if name is not None and self.tap is None else None


def live_branches(model: nn.Module) -> list[LiveBranch]:
    """The attentions of a model that have an active branch, by layer.

    Args:
        model: a PEFT model or its base, or a model of a `preskip_<type>` architecture.

    Raises:
        PreskipError: the model is optimised, so that nothing can be measured between a branch and its attention.
    """
    base = base_model(model)
    found = []
    for name, attention in base.named_modules():
        module = getattr(attention, CHILD, None)
        if not isinstance(module, PreskipLayer | PreskipBranch) or not parts_of(module):
            continue
        if is_optimized(attention):
            raise PreskipError(
                "the model is optimised, which hides its branches inside attention: call .remove() of what "
                "preskip.optimize returned first"
            )
        site = site_of(base, name)
        if isinstance(module, PreskipLayer):
            tap = module.tap
        else:
            tap = tap_of(base, site.name, base.config.preskip_skip_position)
        if isinstance(tap, nn.Dropout):  # BERT's: the skip joins what it reads, the output of the projection
            tap = base.get_submodule(f"{site.name.removesuffix('.self')}.output.dense")
        block = base.get_submodule(f"{site.stack}.{site.layer}")
        found.append(LiveBranch(site=site, attention=attention, block=block, module=module, tap=tap))
    return found


@contextmanager
def replaced(branch: LiveBranch, **methods: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """Give a branch another `enrich` or `content` while the context lasts."""
    own = vars(branch.module)
    before = {name: own[name] for name in methods if name in own}
    own.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del own[name]
        own.update(before)


@contextmanager
def observed(branch: LiveBranch, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """While the context lasts, `see` is called with x̂ as the branch reads it, behind what a peer makes of it."""
    enrich = branch.module.enrich

    def enrich_seen(x: torch.Tensor) -> torch.Tensor:
        see(x)
        return enrich(x)

    with replaced(branch, enrich=enrich_seen):
        yield


def parts_of(module: Branch) -> list[str]:
    """Which of `PARTS` a branch has; of an adapter's, which its active ones have."""
    if isinstance(module, PreskipBranch):
        active = [module.settings]
    else:
        active = [module.settings[name] for name in module.active_names()]
    parts = []
    if any(settings.content_skip or not settings.enrich_attention for settings in active):
        parts.append("skip")
    if any(settings.preprojection and settings.enrich_attention for settings in active):
        parts.append("enrichment")
    return parts


def skip_weight(linears: dict[str, nn.Linear]) -> torch.Tensor | None:
    """W_skip [d, d] of a branch's matrices, the product of a low-rank one, or None."""
    if "skip" in linears:
        return float_weight(linears["skip"])
    if "skip_up" in linears:
        return float_weight(linears["skip_up"]) @ float_weight(linears["skip_down"])
    return None
