"""The plain architecture of a run: a named shape or a config file, with the user's changes and the tokenizer's size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from preskip.architecture import TYPES
from preskip.architecture.config import PREFIX
from preskip.architecture.shapes import SHAPES, shape_config
from preskip.errors import PreskipError, one_line
from preskip.runs.files import read_json


def tokenizer_fields(tokenizer: Any) -> dict[str, Any]:
    """What a model's config takes from its tokenizer.

    Its ids may have gaps: the vocabulary reaches to the highest. A padding token that is also start or end is left out:
    transformers never trains the embedding of the padding token.
    """
    start, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return {
        "vocab_size": max(len(tokenizer), 1 + max(tokenizer.get_vocab().values())),
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": None if padding in (start, end) else padding,
    }


def plain_config(
    arch: str, overrides: Mapping[str, Any], tokenizer: Mapping[str, Any], *, own_vocabulary: bool = False
) -> PreTrainedConfig:
    """The config of the architecture without branches.

    Args:
        arch: a name of `SHAPES`, or the path of a `config.json` or its folder.
        overrides: fields to change; a `vocab_size` among them is kept.
        tokenizer: `tokenizer_fields`.
        own_vocabulary: keep the architecture's own vocabulary size where the tokenizer fits into it.

    Raises:
        PreskipError: an unknown name, a file that is no config of a plain architecture, fields that do not fit
            together, or a vocabulary too small for the tokenizer.
    """
    needed = tokenizer["vocab_size"]
    values = {**tokenizer, **overrides}
    if not isinstance(values["vocab_size"], int):
        raise PreskipError(f"vocab_size {values['vocab_size']!r} is not a whole number: give {needed} or more")
    if values["vocab_size"] < needed:
        raise PreskipError(
            f"vocab_size {values['vocab_size']} is too small for the tokenizer, whose ids go up to {needed - 1}: raise "
            f"it to {needed}, or leave it out"
        )
    if arch in SHAPES:
        _check_heads({**SHAPES[arch].settings, **values}.get)
    config = _make(arch, values)
    if own_vocabulary and "vocab_size" not in overrides:
        without = {key: value for key, value in values.items() if key != "vocab_size"}
        own = _make(arch, without)
        config = own if own.vocab_size >= needed else config
    _check_heads(lambda name: getattr(config, name, None))
    return config


def _check_heads(value: Callable[[str], Any]) -> None:
    """Refuse heads that cannot share the width; transformers says so in several ways, or when it computes."""
    width, heads = value("hidden_size"), value("num_attention_heads")
    shared = value("num_key_value_heads") or heads
    if not all(isinstance(number, int) and number > 0 for number in (width, heads, shared)):
        return  # the config's own validation names it
    if value("head_dim") is None and width % heads:
        raise PreskipError(f"--hidden-size {width} cannot be shared by {heads} heads: give a multiple")
    if heads % shared:
        raise PreskipError(f"{heads} heads cannot share {shared} key-value heads evenly: give a divisor to --kv-heads")


def _make(arch: str, values: dict[str, Any]) -> PreTrainedConfig:
    """The config with these fields; what transformers refuses becomes one line."""
    file = config_file(arch)
    try:
        return shape_config(arch, branch=None, **values) if file is None else _from_file(arch, file, values)
    except PreskipError:
        raise
    except Exception as error:  # the configs raise many kinds
        raise PreskipError(f"--arch {arch}: {one_line(error, 200)}") from None


def config_file(arch: str) -> Path | None:
    """The file of an architecture that is given as one, or as its folder; None where it is the name of a shape."""
    path = Path(arch).expanduser()
    if arch in SHAPES or not (arch.endswith(".json") or path.exists()):
        return None
    return path / "config.json" if path.is_dir() else path


def _from_file(arch: str, path: Path, values: dict[str, Any]) -> PreTrainedConfig:
    if not path.is_file():
        raise PreskipError(f"--arch {arch}: {path} does not exist: check the path")
    stored = read_json(path)
    base_type = str(stored.get("model_type")) if isinstance(stored, dict) else "none"
    if base_type.startswith(PREFIX):
        plain = base_type.removeprefix(PREFIX)
        raise PreskipError(f"{path} is a {base_type}: give the config of a plain {plain}; the arms add the branch")
    if base_type not in TYPES:
        raise PreskipError(f"{path} is of type {base_type!r}: there is an architecture for {', '.join(TYPES)}")
    fields = {
        key: value
        for key, value in stored.items()
        if key not in ("model_type", "architectures", "torch_dtype", "dtype", "transformers_version")
    }
    if "num_hidden_layers" in values:  # one entry per layer, made anew from the number of layers
        fields = {key: value for key, value in fields.items() if key not in ("layer_types", "no_rope_layers")}
    default = AutoConfig.for_model(base_type)
    known = {field.name for field in dataclasses.fields(default)}
    names = dict(type(default).attribute_map)
    if "n_inner" in known:  # GPT-2's name, which transformers does not map
        names["intermediate_size"] = "n_inner"
    given = {names.get(key, key): value for key, value in values.items()}
    if unknown := sorted(given.keys() - known):
        raise PreskipError(f"--arch {arch}: {unknown[0]} is no field of a {base_type} config: check its name")
    return AutoConfig.for_model(base_type, **{**fields, **given})
