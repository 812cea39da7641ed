"""Named shapes to train from scratch: every Pythia size, and small modern Llama shapes.

Pythia: Biderman et al. 2023 (arXiv 2304.01373), sizes as published in its checkpoints' configs.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from preskip.architecture.config import branch_fields
from preskip.architecture.models import architecture
from preskip.branch_settings import BranchSettings
from preskip.errors import PreskipError


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A base architecture with its sizes.

    Attributes:
        base_type: transformers' model type.
        settings: fields of that type's config.
    """

    base_type: str
    settings: dict[str, Any]


def _shape(base_type: str, layers: int, width: int, heads: int, inner: int, vocabulary: int, **more: Any) -> Shape:
    rope = {"rope_type": "default", "rope_theta": 10000.0, **more.pop("rope", {})}
    settings = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rope_parameters": rope,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return Shape(base_type=base_type, settings={**settings, **more})


def _pythia(layers: int, width: int, heads: int, vocabulary: int = 50304) -> Shape:
    more = {"layer_norm_eps": 1e-5, "hidden_act": "gelu", "use_parallel_residual": True, "tie_word_embeddings": False}
    more["rope"] = {"partial_rotary_factor": 0.25}
    return _shape("gpt_neox", layers, width, heads, 4 * width, vocabulary, **more)


def _llama(
    layers: int, width: int, heads: int, kv_heads: int, inner: int, vocabulary: int = 49152, **more: Any
) -> Shape:
    own = {"num_key_value_heads": kv_heads, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    return _shape("llama", layers, width, heads, inner, vocabulary, **{**own, **more})


SHAPES: dict[str, Shape] = {
    "pythia-14m": _pythia(6, 128, 4),
    "pythia-31m": _pythia(6, 256, 8),
    "pythia-70m": _pythia(6, 512, 8),
    "pythia-160m": _pythia(12, 768, 12),
    "pythia-410m": _pythia(24, 1024, 16),
    "pythia-1b": _pythia(16, 2048, 8),
    "pythia-1.4b": _pythia(24, 2048, 16),
    "pythia-2.8b": _pythia(32, 2560, 32),
    "pythia-6.9b": _pythia(32, 4096, 32, 50432),
    "pythia-12b": _pythia(36, 5120, 40, 50688),
    # Width-to-depth and SwiGLU ratios of recent small models; the named sizes are without embeddings.
    "llama-1m": _llama(5, 128, 4, 4, 344, 2048),
    "llama-3m": _llama(7, 192, 6, 3, 512, 4096),
    "llama-10m": _llama(8, 320, 5, 5, 864, 8192),
    "llama-30m": _llama(10, 512, 8, 4, 1376, 16384),
    "llama-106m": _llama(30, 576, 9, 3, 1536),
    # Meta Llama 3 8B, sizes as published.
    "llama-3-8b": _llama(
        32,
        4096,
        32,
        8,
        14336,
        128256,
        tie_word_embeddings=False,
        rope={"rope_theta": 500000.0},
        max_position_embeddings=8192,
    ),
}


def shape_config(name: str, *, branch: BranchSettings | None, **overrides: Any) -> PreTrainedConfig:
    """The config of a named shape.

    Args:
        name: one of `SHAPES`.
        branch: what its branches are made of; None is the plain transformers config without any.
        overrides: other values of the config's fields, e.g. hidden_size; also `preskip_layers`.

    Raises:
        PreskipError: an unknown name, or sizes that do not fit each other.
    """
    if name not in SHAPES:
        near = difflib.get_close_matches(name, SHAPES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(SHAPES)}"
        raise PreskipError(f"there is no shape {name!r}: {hint}")
    shape = SHAPES[name]
    values = {**shape.settings, **overrides}
    model_type = shape.base_type
    if branch is not None:
        model_type = architecture(shape.base_type).config.model_type
        values = branch_fields(branch) | values
    known = {field.name for field in fields(AutoConfig.for_model(model_type))}
    unknown = sorted(overrides.keys() - known)
    if unknown:
        raise PreskipError(
            f"{unknown[0]} is no field of a {model_type} config: the sizes are {', '.join(shape.settings)}"
        )
    try:
        return AutoConfig.for_model(model_type, **values)
    except (StrictDataclassError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, PreskipError):
            raise
        raise PreskipError(f"shape {name} with {overrides}: {' '.join(str(error).split())}") from None
