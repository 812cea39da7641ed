"""The trained weights that `Trainer`'s own file of a checkpoint does not hold under their module names.

transformers stores the experts of a mixture as the published checkpoints name them, and PEFT drops what it does not
count to an adapter; loading such a file passes over whatever has another name. These weights lie beside it.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from preskip.errors import PreskipError

FILE = "trained.safetensors"


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
    """Put back what `write_rest` has stored.

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
    if (checkpoint / FILE).is_file():
        model.load_state_dict(load_file(checkpoint / FILE), strict=False)


def _stored(checkpoint: Path) -> set[str]:
    """Names of all tensors in a checkpoint."""
    names: set[str] = set()
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names
