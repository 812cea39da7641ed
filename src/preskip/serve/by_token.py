"""Several adapters in vLLM: each token has the branch of the adapter that its request has named.

A model there sees the tokens of all requests in one row. Of a request's model name it learns through LoRA alone: vLLM
adds a layer's LoRA of that name to the tokens of that request. So every attention with branches has one more layer,
1 → 1 with weight 0, and each adapter is a LoRA on that layer: of rank 1, without any effect on the base, that adds the
adapter's number. What the layer makes of ones are the numbers of the tokens' adapters; 0 is the base. vLLM keeps the
prefix caches of LoRAs apart, batches their requests together, and lists their names as models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from preskip.errors import PreskipError
from preskip.rows import BASE

PICK = "preskip_pick"
# Whole numbers up to this are exact in bfloat16.
MOST = 256


class ByToken(nn.Module):
    """The branches of several adapters at one attention; each token has one of them or none.

    Args:
        branches: by adapter name, in the order of the adapters' numbers.
        pick: ones [..., 1] → numbers [..., 1] of the tokens' adapters, 1 for the first; 0 for no branch.
    """

    def __init__(self, branches: Mapping[str, nn.Module], pick: nn.Module) -> None:
        super().__init__()
        self.names = list(branches)
        for name, branch in {**branches, PICK: pick}.items():
            self.add_module(name, branch)

    def enrich(self, x: torch.Tensor) -> torch.Tensor:
        """What attention reads, [B, T, d]."""
        return self._each(x, x, lambda branch, tokens: branch.enrich(tokens))

    def content(self, attention_input: torch.Tensor) -> torch.Tensor:
        """What goes around attention, [B, T, d]; 0 for tokens whose branch adds nothing."""
        zero = torch.zeros_like(attention_input)
        return self._each(attention_input, zero, lambda branch, tokens: branch.content(tokens))

    def _each(
        self, x: torch.Tensor, rest: torch.Tensor, run: Callable[[Any, torch.Tensor], torch.Tensor | None]
    ) -> torch.Tensor:
        """Run each adapter's branch on its own tokens; the others keep `rest`."""
        # Looked up anew: vLLM puts a layer with LoRA in its place after the model is made.
        numbers = self.get_submodule(PICK)(x.new_ones(*x.shape[:-1], 1)).flatten().round().long()
        flat, result = x.flatten(0, -2), rest.flatten(0, -2)
        for number in numbers.unique().tolist():
            if number == 0:
                continue
            places = (numbers == number).nonzero().flatten()
            part = run(self.get_submodule(self.names[number - 1]), flat[places])
            if part is not None:
                result = result.index_copy(0, places, part.to(result.dtype))
        return result.view_as(rest)


def write_loras(adapters: Sequence[str], branches: Sequence[str], out: Path) -> list[dict[str, str]]:
    """Write each adapter's LoRA.

    Args:
        adapters: names, in the order of the checkpoint's config.
        branches: paths of the branches in the checkpoint's keys, e.g. `model.layers.0.self_attn.preskip`.
        out: an empty folder.

    Returns:
        Name and path of each.

    Raises:
        PreskipError: more adapters than can be told apart.
    """
    from safetensors.torch import save_file

    if len(adapters) > MOST:
        raise PreskipError(f"{len(adapters)} adapters are too many for one server: {MOST} can be told apart")
    written = []
    for number, name in enumerate(adapters, 1):
        folder = out / str(number)
        folder.mkdir()
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [PICK]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        tensors = {}
        for path in branches:
            tensors[f"base_model.model.{path}.{PICK}.lora_A.weight"] = torch.ones(1, 1)
            tensors[f"base_model.model.{path}.{PICK}.lora_B.weight"] = torch.full((1, 1), float(number))
        save_file(tensors, folder / "adapter_model.safetensors")
        written.append({"name": name, "path": str(folder)})
    return written


def engine_options(count: int) -> dict[str, Any]:
    """What vLLM's `LLM` needs to pick among so many adapters."""
    # One slot more than is filled: on a CPU vLLM gives tokens without a LoRA the last slot's, where others have one.
    slots = {"max_loras": count + 1, "max_lora_rank": 1}
    return {"enable_lora": True, **slots, "lora_target_modules": [PICK], "enforce_eager": True}


def server_arguments(loras: Sequence[Mapping[str, str]]) -> list[str]:
    """The same for vLLM's server, which answers under the LoRAs' names, and under `BASE` without a branch."""
    arguments = []
    for name, value in engine_options(len(loras)).items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
    return [*arguments, "--served-model-name", BASE, "--lora-modules", *map(json.dumps, loras)]
