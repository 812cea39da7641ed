"""What `import preskip` hooks into PEFT and transformers, each the moment it is imported or asked for.

Both take seconds to import, and `preskip --help` should not. The classes of the architectures derive from transformers'
model classes, which cannot be imported while transformers is half-way through importing itself; that is when its Auto
classes are usually loaded. So the types are registered when a config of one is first asked for.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import wrapt

from preskip.model_types import PREFIX, TYPES


class _LazyTypes(dict):
    """transformers' table of types that were registered from outside; looking up one of ours registers all of ours."""

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str) and key.startswith(PREFIX) and not super().__contains__(key):
            importlib.import_module("preskip.architecture")
        return super().__contains__(key)


def install() -> None:
    """Hook into PEFT and transformers; at once where they are loaded already."""
    wrapt.register_post_import_hook(_extend_peft, "peft")
    wrapt.register_post_import_hook(_extend_auto_config, "transformers.models.auto.configuration_auto")


def _extend_peft(module: ModuleType) -> None:
    """Register the PEFT method; let other adapters find a baked model's modules as they find the base type's."""
    from peft.utils import constants

    importlib.import_module("preskip.adapter")
    for name, targets in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(targets, dict):
            targets.update({f"{PREFIX}{base}": targets[base] for base in TYPES if base in targets})


def _extend_auto_config(module: Any) -> None:
    """Let transformers' CONFIG_MAPPING find our types; a second call does nothing."""
    if not isinstance(module.CONFIG_MAPPING._extra_content, _LazyTypes):
        module.CONFIG_MAPPING._extra_content = _LazyTypes(module.CONFIG_MAPPING._extra_content)
