"""Bytes and FLOPs that a model's own weights and its cache make inevitable, and the least time they take on a device.

Nothing else is counted: activations may stay in a cache, and norms cost little.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch

from preskip.arms.experts import experts_of
from preskip.arms.flops import active_weights, cache_width, head_width, looked_up, matrix_weights
from preskip.attach import CHILD
from preskip.bench.settings import Work
from preskip.train.speed import measured_peak, synchronise


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What one model reads and multiplies.

    Attributes:
        body: weights that each token is multiplied by, before the output head.
        head: the output head's weights.
        trainable: of `body`, those that are trained.
        weight_bytes: bytes of all weights that a forward pass of one token reads, in the dtype in which they are
            multiplied.
        body_bytes: of these, those of the layers.
        cache_width: numbers in the K/V cache per token, all layers together.
        attention_width: heads times their width, summed over the layers.
        expert_bytes: of `body_bytes`, those of the experts that the token visits.
        expert_sets: how many tokens may visit experts of their own: all experts over those that one visits.
    """

    body: int
    head: int
    trainable: int
    weight_bytes: int
    body_bytes: int
    cache_width: int
    attention_width: int
    expert_bytes: int = 0
    expert_sets: float = 1.0

    def scaled(self, factor: float) -> Counts:
        """Of the same model with `factor` times as many layers."""
        return replace(
            self,
            body=round(self.body * factor),
            trainable=round(self.trainable * factor),
            weight_bytes=self.weight_bytes + round(self.body_bytes * (factor - 1)),
            body_bytes=round(self.body_bytes * factor),
            cache_width=round(self.cache_width * factor),
            attention_width=round(self.attention_width * factor),
            expert_bytes=round(self.expert_bytes * factor),
        )


def count(model: Any, dtype: torch.dtype) -> Counts:
    """Count a causal language model with whatever is inserted.

    Args:
        model: of transformers, or a PEFT model.
        dtype: of the activations.
    """
    config = model.config.get_text_config()
    embeddings = looked_up(model)
    head_weight = model.get_output_embeddings().weight
    body, head = matrix_weights(model)
    layers, of_experts, expert_sets = 0, 0, 1.0
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) in embeddings or tensor is head_weight or "rotary" in name:
            continue
        # An fp32 weight of a branch beside bfloat16 activations is read as its bfloat16 copy (`preskip.casting`).
        cast = f".{CHILD}." in name and tensor.dtype == torch.float32 and dtype == torch.bfloat16
        size = active_weights(tensor, config) * (2 if cast else tensor.element_size())
        layers += size
        experts, visited = experts_of(tensor, config)
        if experts > visited:
            of_experts, expert_sets = of_experts + size, experts / visited
    heads, width = config.num_attention_heads, head_width(config)
    return Counts(
        body=body,
        head=head,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim >= 2),
        weight_bytes=layers + head * head_weight.element_size(),
        body_bytes=layers,
        cache_width=cache_width(config),
        attention_width=config.num_hidden_layers * heads * width,
        expert_bytes=of_experts,
        expert_sets=expert_sets,
    )


def flops(counts: Counts, work: Work) -> int:
    """FLOPs of one measurement's unit: a whole pass, or one decoding step. Causal attention, entries seen only."""
    if work.kind == "decode":
        seen = work.tokens + (work.new_tokens + 1) / 2  # on average over the steps
        return round(work.batch * (2 * (counts.body + counts.head) + 4 * seen * counts.attention_width))
    tokens = work.batch * work.tokens
    attention = 4 * work.batch * (work.tokens * (work.tokens + 1) // 2) * counts.attention_width
    if work.kind == "prefill":
        return 2 * tokens * counts.body + 2 * work.batch * counts.head + attention
    forward = 2 * tokens * (counts.body + counts.head)
    if work.kind == "scoring":
        return forward + attention
    # Backward through every matrix for the activations, and for the weights that are trained.
    return 2 * forward + 2 * tokens * counts.trainable + 3 * attention


def bytes_moved(counts: Counts, work: Work, itemsize: int) -> int:
    """Bytes of one unit: every weight once (training: twice), and the K/V cache as it is read and written.

    Of a mixture of experts those that the tokens visit, as many as these can be: no two tokens share one as long as
    there are others.

    Args:
        counts: of the model.
        work: what is done.
        itemsize: bytes of one number in the cache.
    """
    at_once = work.batch * (1 if work.kind == "decode" else work.tokens)
    weights = counts.weight_bytes + round(counts.expert_bytes * (min(at_once, counts.expert_sets) - 1))
    if work.kind == "decode":
        seen = work.tokens + (work.new_tokens + 1) / 2
        return weights + round(work.batch * seen * counts.cache_width * itemsize)
    if work.kind == "prefill":
        return weights + work.batch * work.tokens * counts.cache_width * itemsize
    return weights * (2 if work.kind == "training" else 1)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a device reaches, measured on it: matrix products in one dtype, and copies of a large block."""

    flops_per_second: float
    bytes_per_second: float

    def seconds(self, work_flops: float, work_bytes: float) -> float:
        """The least time for so many FLOPs and bytes: the longer of the two, as they may overlap."""
        return max(work_flops / self.flops_per_second, work_bytes / self.bytes_per_second)


def measure_limits(
    device: torch.device, dtype: torch.dtype, *, seconds: float = 1.0, size: int | None = None
) -> Limits:
    """Measure the limits of a device.

    Args:
        device: where.
        dtype: of the matrix products.
        seconds: how long to measure each.
        size: side of the matrices and, squared, numbers in the block to copy; None takes what fits the device.
    """
    peak = measured_peak(device, dtype, sizes=None if size is None else (size,), seconds=seconds)
    return Limits(flops_per_second=peak, bytes_per_second=_copy_rate(device, seconds, size))


def _copy_rate(device: torch.device, seconds: float, size: int | None) -> float:
    """Bytes per second of a copy, read and written ones; the quickest counts, as in `measured_peak`."""
    numbers = size**2 if size else 2**24 if device.type == "cpu" else min(2**30, free_memory(device) // 16)
    source = torch.ones(numbers, dtype=torch.float32, device=device)
    target = source.clone()
    best, started = 0.0, time.perf_counter()
    while time.perf_counter() - started < seconds or best == 0.0:
        synchronise(device)
        begin = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        best = max(best, 2 * 4 * numbers / (time.perf_counter() - begin))
    return best


def free_memory(device: torch.device) -> int:
    """Bytes that may still be allocated, those that torch holds on a GPU for later included."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
