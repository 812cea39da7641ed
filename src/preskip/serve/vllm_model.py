"""vLLM's Transformers backend with what it drops put back, and a refusal where a branch is missing.

vLLM replaces every norm by its own module, and a hook on the old one is gone without an error. With
`skip_position="residual"` that hook adds the skip.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.transformers import (
    TransformersForCausalLM as StockForCausalLM,
)
from vllm.model_executor.models.transformers import (
    TransformersMoEForCausalLM as StockMoEForCausalLM,
)

from preskip.errors import PreskipError
from preskip.serve.branches import check_hooks, put_back, with_scales
from preskip.serve.by_token import PICK
from preskip.serve.versions import serving_problem


class _WithBranches:
    """Checks the versions, keeps the branch's weights out of the base's quantisation, and counts branches and hooks."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        if problem := serving_problem():
            raise RuntimeError(problem)
        config = vllm_config.model_config.hf_config
        if config.preskip_adapters and not vllm_config.model_config.enforce_eager:
            raise PreskipError("several adapters pick their tokens, which does not compile: give vLLM --enforce-eager")
        # The matrices are made and loaded in the model's dtype (`with_scales`).
        config.preskip_quantize = None
        self._picks: list[str] = []
        self._has_picks = bool(vllm_config.lora_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]

    def recursive_replace(self) -> None:
        """As vLLM's, then every hook on the modules that are there now."""
        super().recursive_replace()  # type: ignore[misc]
        put_back(*self._parts(), _plain, self._pick if self._has_picks else None, is_whole=self._is_whole())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As vLLM's; once all modules are in place, no hook may be missing."""
        zeros = ((f"{path}.weight", torch.zeros(1, 1)) for path in self._picks)
        loaded = super().load_weights(chain(with_scales(weights), zeros))  # type: ignore[misc]
        count = check_hooks(*self._parts(), is_whole=self._is_whole())
        logging.getLogger("vllm.preskip").info("Preskip: %d branches, every hook in place", count)
        return loaded

    def _pick(self, path: str) -> nn.Module:
        self._picks.append(f"model.{path}.{PICK}")
        return ReplicatedLinear(1, 1, bias=False, prefix=self._picks[-1], return_bias=False)

    def _parts(self) -> tuple[nn.Module, Any]:
        backend: Any = self
        return backend.model, backend.config

    def _is_whole(self) -> bool:
        backend: Any = self
        return backend.pp_group.world_size == 1


def _plain(linear: Any, prefix: str) -> Any:
    """A layer of a branch as vLLM has made it, without quantisation: the branch stays in the model's dtype."""
    if linear.quant_config is None:
        return linear
    return ReplicatedLinear(linear.input_size, linear.output_size, bias=False, prefix=prefix, return_bias=False)


# `ModelConfig.using_transformers_backend` compares the names, so they must be those of vLLM's own.
class TransformersForCausalLM(_WithBranches, StockForCausalLM):
    """Serves every `preskip_<type>` with dense MLPs."""


class TransformersMoEForCausalLM(_WithBranches, StockMoEForCausalLM):
    """Serves `preskip_mixtral`."""
