"""What one arm is: a name, a sentence, a default learning rate, and the PEFT configuration it trains.

Adding an arm is one entry in `preskip.arms.catalogue.ARMS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from preskip.branch import BranchSettings

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class ArmContext:
    """What an arm may depend on.

    Attributes:
        base: the untouched pretrained model.
        settings: the branch that the reference arm inserts.
        skip_position: see `PreskipConfig`.
        layers: layer indices to adapt; None for all.
        targets: paths of the attention modules to adapt, all of them in these layers.
        by_name: whether the user chose the targets by an expression, not by layers.
        budget: trainable parameters that a matched arm must come to.
    """

    base: nn.Module
    settings: BranchSettings
    skip_position: str
    layers: tuple[int, ...] | None
    targets: tuple[str, ...]
    budget: int
    by_name: bool = False


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing to compare.

    Attributes:
        name: as given on the command line.
        description: one sentence for tables and reports.
        learning_rate: default peak learning rate; None for an arm that does not train.
        make_config: builds the PEFT configuration, or None for the untouched base.
        matched: whether its trainable parameters must equal the budget within 0.5 %.
    """

    name: str
    description: str
    learning_rate: float | None
    make_config: Callable[[ArmContext], PeftConfig] | None
    matched: bool = True
