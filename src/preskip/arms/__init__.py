"""What can be compared, and how their budgets are matched."""

from preskip.arms.arm import Arm, ArmContext
from preskip.arms.budget import branch_parameters, lora_ranks
from preskip.arms.catalogue import ARMS, resolve_arms

__all__ = ["ARMS", "Arm", "ArmContext", "branch_parameters", "lora_ranks", "resolve_arms"]
