"""Names of adapters: which ones PEFT could not save, switch or find again."""

from __future__ import annotations

from torch import nn

from preskip.attach import CHILD
from preskip.branch import PARTS
from preskip.errors import PreskipError
from preskip.rows import BASE

# Parts of the keys of adapted models that no tensor of the base may have: the branch's own, PEFT's wrappers'.
_RESERVED = {
    CHILD, *PARTS, "dropout", "settings", "base_model", "model", "base_layer", "modules_to_save", "original_module",
    "weight", "bias",
}  # fmt: skip
# Of the modules that hold the branches of a baked checkpoint by their names (`SeveralBranches`, `ByToken`).
_TAKEN_WHEN_BAKED = {"enrich", "content", "names", "_names", "_each", "row_names", "hook_handles", "preskip_pick"}


def check_adapter_name(name: object, model: nn.Module) -> None:
    """Refuse a name that would lose work: PEFT tells adapters apart by their name as a part of a tensor's key.

    Where the name is also a part of the model's own keys (`self_attn`, `0`, `up`), saving another adapter takes those
    tensors for this one's and leaves them out without a word.

    Args:
        name: of the new adapter.
        model: that gets it, with or without adapters.

    Raises:
        PreskipError: the name is no text, is empty, cannot be part of a key or a folder's name, or is one already.
    """
    if not isinstance(name, str) or not name:
        raise PreskipError(f"adapter_name={name!r} is not possible: give a word, such as 'default'")
    if "." in name or "/" in name or "\\" in name or not name.isprintable() or any(letter.isspace() for letter in name):
        raise PreskipError(
            f"adapter_name={name!r} is not possible: dots, slashes and spaces have a meaning in keys and paths; use "
            "letters, digits, - and _"
        )
    own = {part for key, _ in model.named_modules() for part in key.split(".")}
    own |= {key.rpartition(".")[2] for key, _ in (*model.named_parameters(), *model.named_buffers())}
    if name in own | _RESERVED:
        raise PreskipError(
            f"adapter_name={name!r} is not possible: it is part of the names of this model's tensors, and PEFT could "
            "not tell its weights from those of other adapters; give another, such as 'my-adapter'"
        )
    if name == BASE:
        raise PreskipError(f"adapter_name={name!r} is not possible: it means no adapter; give another")
    if name in _TAKEN_WHEN_BAKED:
        raise PreskipError(
            f"adapter_name={name!r} is not possible: beside other adapters in one checkpoint it would stand for a part "
            "of the module that holds them; give another, such as 'my-adapter'"
        )
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name):
        raise PreskipError(f"adapter_name={name!r} is not possible: torch reserves it; give another")
