"""The trained weights of a checkpoint under their module names.

transformers stores the experts of a mixture as the published checkpoints name them, and PEFT drops what it does not
count to an adapter; loading such a file passes over whatever has another name. These weights lie beside it. Of a model
that is frozen in part, and no PEFT model, `Trainer` would store the whole: its checkpoints hold what is trained alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_NAME

from preskip.errors import PreskipError

FILE = "trained.safetensors"


def is_partly_frozen(model: nn.Module) -> bool:
    """Whether some weights are trained and others are not."""
    return len({weight.requires_grad for weight in model.parameters()}) == 2


def write_trained(checkpoint: Path, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Store the trained weights, and buffers that training may change, alone, in the file that `Trainer` reads.

    Args:
        checkpoint: its folder.
        model: says what is trained.
        state: of the model, whole.
    """
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    names += [name for name, _ in model.named_buffers()]
    tensors = {name: state[name].detach().contiguous() for name in names if name in state}
    checkpoint.mkdir(parents=True, exist_ok=True)
    save_file(tensors, checkpoint / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})


def write_rest(checkpoint: Path, model: nn.Module) -> None:
    """Store the trained weights that are not in the checkpoint under their names yet."""
    stored = _stored(checkpoint)
    rest = {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in stored
    }
    if rest:
        save_file(rest, checkpoint / FILE)


def read_rest(checkpoint: Path, model: nn.Module) -> None:
    """Put back what `write_trained` and `write_rest` have stored.

    Raises:
        PreskipError: a trained weight is not in the checkpoint; resumed, it would begin at its initialisation.
    """
    stored = _stored(checkpoint)
    missing = [name for name, weight in model.named_parameters() if weight.requires_grad and name not in stored]
    if missing:
        raise PreskipError(
            f"checkpoint {checkpoint} lacks {len(missing)} trained weights, {missing[0]} among them: delete "
            f"{checkpoint.parent} to begin this training anew"
        )
    # `Trainer` itself passes over what a compiled model names otherwise.
    for name in (SAFE_WEIGHTS_NAME, FILE) if is_partly_frozen(model) else (FILE,):
        if (checkpoint / name).is_file():
            model.load_state_dict(load_file(checkpoint / name), strict=False)


def _stored(checkpoint: Path) -> set[str]:
    """Names of all tensors in a checkpoint."""
    names: set[str] = set()
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names
