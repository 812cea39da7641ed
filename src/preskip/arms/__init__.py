"""What can be compared, and how their budgets are matched."""

from preskip.arms.arm import Arm, ArmContext
from preskip.arms.budget import attention_paths, branch_parameters, lora_ranks, match_expansion
from preskip.arms.catalogue import ARMS, resolve_arms

__all__ = [
    "ARMS",
    "Arm",
    "ArmContext",
    "attention_paths",
    "branch_parameters",
    "lora_ranks",
    "match_expansion",
    "resolve_arms",
]
