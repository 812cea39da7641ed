"""What can be compared, how budgets are matched, and how an arm gets into the model and out of it."""

from preskip.arms.arm import Arm, ArmContext
from preskip.arms.budget import (
    attention_layers,
    attention_paths,
    branch_parameters,
    linear_shapes,
    lora_ranks,
    match_expansion,
)
from preskip.arms.catalogue import ARMS, REGISTRY, SCRATCH_ARMS, resolve_arms

__all__ = [
    "ARMS",
    "REGISTRY",
    "SCRATCH_ARMS",
    "Arm",
    "ArmContext",
    "attention_layers",
    "attention_paths",
    "branch_parameters",
    "linear_shapes",
    "lora_ranks",
    "match_expansion",
    "resolve_arms",
]
