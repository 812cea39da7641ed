"""The base types that have a `preskip_<type>` architecture, registered when a config of such a type is first asked for.

Their classes derive from transformers' model classes, and those cannot be imported while transformers is half-way
through importing itself, which is when its Auto classes are usually loaded.
"""

from __future__ import annotations

import importlib
from typing import Any

TYPES = (
    "llama", "gpt_neox", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "olmo2", "phi3", "smollm3",
    "mixtral",
)  # fmt: skip
PREFIX = "preskip_"


class _LazyTypes(dict):
    """transformers' table of types that were registered from outside; looking up one of ours registers all of ours."""

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str) and key.startswith(PREFIX) and not super().__contains__(key):
            importlib.import_module("preskip.architecture")
        return super().__contains__(key)


def install(config_mapping: Any) -> None:
    """Let transformers' CONFIG_MAPPING find our types; a second call does nothing."""
    if not isinstance(config_mapping._extra_content, _LazyTypes):
        config_mapping._extra_content = _LazyTypes(config_mapping._extra_content)
