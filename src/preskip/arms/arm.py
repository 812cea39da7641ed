"""What one arm is: a name, a sentence, and how it is made on a frozen base, from scratch, or both.

Adding an arm is one entry in `preskip.arms.catalogue`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from preskip.errors import PreskipError

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn
    from transformers import PreTrainedConfig

    from preskip.branch_settings import BranchSettings

# How an arm's trainable-parameter count relates to the reference's: equal; fewer or more by its nature; far fewer
# (shown as the floor); all of the model's (the ceiling).
Budget = Literal["matched", "smaller", "larger", "floor", "ceiling"]
MATCHES = ("params", "flops", "none")


@dataclass(frozen=True, kw_only=True)
class ArmContext:
    """What an arm on a frozen base may depend on.

    Attributes:
        base: the untouched pretrained model.
        settings: the branch that the reference arm inserts.
        skip_position: see `PreskipConfig`.
        layers: layer indices to adapt; None for all.
        targets: paths of the attention modules to adapt, all of them in these layers.
        budget: trainable parameters that a matched arm must come to.
        by_name: whether the user chose the targets by an expression, not by layers.
        match: what is held equal: "params" (trained weights), "flops" (forward FLOPs per token that the arm adds), or
            "none" (every arm keeps its own size).
        lora_ranks: rank of each LoRA arm by name for `match="none"`; a number below 1 is a share of the width.
        lora_scale: factor on LoRA's update, alpha over rank; not of rsLoRA, which has its own.
    """

    base: nn.Module
    settings: BranchSettings
    skip_position: str
    layers: tuple[int, ...] | None
    targets: tuple[str, ...]
    budget: int
    by_name: bool = False
    match: str = "params"
    lora_ranks: Mapping[str, float] = field(default_factory=dict)
    lora_scale: float = 1.0


@dataclass(frozen=True)
class Arm:
    """One thing to compare.

    Attributes:
        name: as given on the command line.
        description: one sentence for tables and reports.
        learning_rate: default peak learning rate on a frozen base, and the centre of the grid that `--lr tune`
            searches; None for an arm that does not train there.
        make_config: frozen: builds the PEFT configuration, or several that are stacked in this order; None for an arm
            without inserted weights.
        own_weights: frozen: names of the base's own parameters that are trained in place, and put back afterwards; None
            for an arm that leaves them frozen.
        peers: frozen: settings by name of what is put into the blocks (`preskip.peers`), at identity, or what makes
            them for a context.
        build: from scratch: makes the architecture, of a `preskip.arms.plan.Planner`; None for an arm that is not
            trained from scratch.
        budget: see `Budget`.
        matches: from scratch: what a matched arm has in common with preskip, "parameters" or "training FLOPs" (which
            are matched by the number of steps).
        decisive: whether the reference arm is declared against it.
    """

    name: str
    description: str
    learning_rate: float | None = None
    _: KW_ONLY
    make_config: Callable[[ArmContext], PeftConfig | Sequence[PeftConfig]] | None = None
    own_weights: Callable[[ArmContext], list[str]] | None = None
    peers: Mapping[str, Mapping[str, Any]] | Callable[[ArmContext], Mapping[str, Mapping[str, Any]]] = field(
        default_factory=dict
    )
    build: Callable[[Any], PreTrainedConfig] | None = None
    budget: Budget = "matched"
    matches: str = "parameters"
    decisive: bool = False

    @property
    def trains(self) -> bool:
        """Whether the arm trains anything."""
        return self.is_inserted or self.build is not None

    @property
    def is_inserted(self) -> bool:
        """Whether the arm trains something on a frozen base."""
        return not (self.make_config is None and self.own_weights is None and not self.peers)

    def peers_in(self, context: ArmContext) -> Mapping[str, Mapping[str, Any]]:
        """Settings by name of what is put into the blocks.

        Raises:
            PreskipError: the budget is impossible for this arm; the arm is named.
        """
        try:
            return self.peers(context) if callable(self.peers) else self.peers
        except PreskipError as error:
            raise PreskipError(f"arm {self.name}: {error}") from None

    def configs(self, context: ArmContext) -> list[PeftConfig]:
        """The PEFT configurations to stack, first to last.

        Raises:
            PreskipError: the budget is impossible for this arm, or the model lacks what it adapts; the arm is named.
        """
        if self.make_config is None:
            return []
        try:
            made = self.make_config(context)
        except PreskipError as error:
            raise PreskipError(f"arm {self.name}: {error}") from None
        return list(made) if isinstance(made, Sequence) else [made]
