"""Trained PEFT adapters of any type on a base model, also stacked ones, whole or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import preskip.adapter  # noqa: F401 - registers the PEFT method
from preskip.adapter.norms import float32_norms
from preskip.data.tokenizer import OWN_FILES, load_tokenizer
from preskip.errors import PreskipError, explained, one_line, some
from preskip.peers.insert import SETTINGS, load_peers, peer_weights
from preskip.runs.files import read_json
from preskip.runs.weights import ADAPTER_CONFIG, OWN_WEIGHTS, PEFT_TYPE, adapter_folders

_WEIGHTS = "adapter_model.safetensors"


def load_adapter(base: nn.Module, folder: Path) -> Any:
    """Put a saved adapter on a base model, or several that were trained stacked; all of them are active.

    PEFT fills tensors that a file lacks with fresh ones and drops those it has no place for, with a warning at most;
    here both are errors, for every adapter type.

    Args:
        base: the model that the adapter was trained on; it is changed in place.
        folder: as `adapter_folders` takes it, with safetensors weights, or as `preskip.arms.insert.Inserted.save` has
            written it: with peers, or with weights of the base itself, which take the base's dtype.

    Returns:
        The PEFT model in evaluation mode, on the base's device; of stacked adapters the last one's; the base itself
        with peers or with weights of its own.

    Raises:
        PreskipError: no adapter there, an unknown type, or one that does not fit the model in every tensor.
    """
    parts = adapter_folders(folder)
    if not parts and (folder / SETTINGS).is_file():
        load_peers(base, folder)
        return base.eval()
    if not parts and (folder / OWN_WEIGHTS).is_file():
        _load_own(base, folder)
        return base.eval()
    if not parts:
        raise PreskipError(f"adapter {folder} has no {ADAPTER_CONFIG}: give a folder saved with save_pretrained")
    model: Any = None
    for part in parts:
        _resize_embeddings(base, part / _WEIGHTS)
    own = {id(weight) for weight in base.parameters()}
    for part in parts:
        model = _load_one(base, part, {id(weight) for weight in base.parameters()} - own)
    return model.eval()


def load_tokenizer_of(
    name: str,
    folder: Path | None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    split_special_tokens: bool = False,
) -> Any:
    """The tokenizer saved beside an adapter (with the tokens that were added for it), else the base's.

    Args:
        name: the base, see `preskip.data.tokenizer.load_tokenizer`.
        folder: of the adapter, or None.
        trust_remote_code: allow code from the checkpoint's repository to run.
        revision: of the base, see `preskip.assets.resolve_model`.
        split_special_tokens: see `preskip.data.tokenizer.load_tokenizer`.
    """
    has_own = folder is not None and any((folder / file).is_file() for file in OWN_FILES)
    return load_tokenizer(
        str(folder) if has_own else name,
        trust_remote_code=trust_remote_code,
        revision=revision,
        split_special_tokens=split_special_tokens,
    )


def brought_weights(model: nn.Module, folder: Path) -> list[nn.Parameter]:
    """The weights that `load_adapter` took from a folder that is no PEFT adapter; none where it is one."""
    from safetensors import safe_open

    if adapter_folders(folder):
        return []
    if (folder / SETTINGS).is_file():
        return list(peer_weights(model).values())
    with safe_open(folder / OWN_WEIGHTS, framework="pt") as file:
        return [model.get_parameter(name) for name in file.keys()]  # noqa: SIM118 - it is no mapping


def _load_own(base: nn.Module, folder: Path) -> None:
    """Give the base the weights that an arm has trained of its own."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        saved = load_file(folder / OWN_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise PreskipError(f"{folder / OWN_WEIGHTS} cannot be read: {one_line(error, 200)}") from error
    own = dict(base.named_parameters())
    odd = next((name for name in saved if name not in own or own[name].shape != saved[name].shape), None)
    if odd is not None:
        raise PreskipError(f"{folder} does not fit this model: {odd} is missing or of another size")
    with torch.no_grad():
        for name, weight in saved.items():
            own[name].copy_(weight)


def _resize_embeddings(base: Any, weights: Path) -> None:
    """Give the base as many token embeddings as the adapter brings, which was trained with added tokens."""
    from safetensors import SafetensorError, safe_open

    embeddings = base.get_input_embeddings()
    path = next(path for path, module in base.named_modules() if module is embeddings)
    try:
        with safe_open(weights, framework="pt") as file:
            key = f"base_model.model.{path}.weight"
            rows = file.get_slice(key).get_shape()[0] if key in file.keys() else None  # noqa: SIM118
    except (SafetensorError, OSError):
        return  # named when it is loaded
    if rows is not None and rows != embeddings.num_embeddings:
        base.resize_token_embeddings(rows, mean_resizing=False)


def load_named(base: nn.Module, folders: Mapping[str, Path]) -> Any:
    """Put several saved Preskip adapters of one base on it, each under its name; the first one is active.

    Args:
        base: the model that they were trained on; it is changed in place.
        folders: by name.

    Returns:
        The PEFT model in evaluation mode.

    Raises:
        PreskipError: one is missing, of another type, or does not fit the model in every tensor.
    """
    from peft import PeftModel

    model: Any = None
    for name, folder in folders.items():
        if [read_json(part / ADAPTER_CONFIG).get("peft_type") for part in adapter_folders(folder)] != [PEFT_TYPE]:
            raise PreskipError(f"{folder} is no single Preskip adapter: give a folder saved with save_pretrained")
        with explained(lambda error, folder=folder: f"adapter {folder} does not fit this model: {error}"):  # type: ignore[misc]
            if model is None:
                model = PeftModel.from_pretrained(base, str(folder), adapter_name=name)
            else:
                model.load_adapter(str(folder), adapter_name=name)
    return model.eval()


def _load_one(base: nn.Module, folder: Path, earlier: set[int]) -> Any:
    """Put one adapter on a base that has the weights of earlier ones, known by their ids."""
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils.constants import EMBEDDING_LAYER_NAMES
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if not (folder / _WEIGHTS).is_file():
        raise PreskipError(f"adapter {folder} has no {_WEIGHTS}: save it again with save_pretrained")
    try:
        with safe_open(folder / _WEIGHTS, framework="pt") as file:
            saved = set(file.keys())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # an error below
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # stacked ones are meant
            warnings.filterwarnings("ignore", message="Unsupported layer type")  # every norm, to LN tuning
            model = PeftModel.from_pretrained(base, str(folder), torch_device=str(next(base.parameters()).device))
        if float32_norms(model):
            set_peft_model_state_dict(model, load_file(folder / _WEIGHTS))
    except PreskipError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = one_line(error, 200)
        raise PreskipError(f"adapter {folder} does not fit this model ({type(error).__name__}: {reason})") from error
    # PEFT takes every tensor of a name for that adapter's own, and stacked adapters share theirs.
    state = {key: weight for key, weight in model.state_dict(keep_vars=True).items() if id(weight) not in earlier}
    expected = set(get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False))
    extra = {key for key in saved - expected if not any(name in key for name in EMBEDDING_LAYER_NAMES)}
    for odd, what in ((expected - saved, "lacks"), (extra, "holds a tensor without a place in this model:")):
        if odd:
            raise PreskipError(
                f"adapter {folder} {what} {some(sorted(odd), 1)}: it belongs to another model or is incomplete"
            )
    return model
