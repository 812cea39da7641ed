"""What `import preskip` hooks into PEFT and transformers, each the moment it is imported or asked for.

Both take seconds to import, and `preskip --help` should not. The classes of the architectures derive from transformers'
model classes, which cannot be imported while transformers is half-way through importing itself; that is when its Auto
classes are usually loaded. So the types are registered when a config of one is first asked for.

Beside torch and transformers nothing is needed here: a server imports this without PEFT.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Mapping
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from preskip.model_types import PREFIX, TYPES


class _LazyTypes(dict):
    """transformers' table of types that were registered from outside; looking up one of ours registers all of ours."""

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str) and key.startswith(PREFIX) and not super().__contains__(key):
            importlib.import_module("preskip.architecture")
        return super().__contains__(key)


class _AfterImport(MetaPathFinder):
    """Calls a function with a module once that module has been executed."""

    def __init__(self, waiting: Mapping[str, Callable[[Any], None]]) -> None:
        self.waiting = waiting

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own spec, whose loader calls the function afterwards; None for all other modules."""
        call = self.waiting.get(fullname)
        if call is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        # A copy: some loaders serve many modules.
        execute, spec.loader = spec.loader.exec_module, copy.copy(spec.loader)

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            call(module)

        spec.loader.exec_module = execute_and_call  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Hook into PEFT and transformers; at once where they are loaded already. A second call does nothing."""
    # By its name: a reloaded module has a class of its own. Two would ask each other for PEFT without end.
    if any(type(finder).__name__ == _AfterImport.__name__ for finder in sys.meta_path):
        return
    waiting = {"peft": _extend_peft, "transformers.models.auto.configuration_auto": _extend_auto_config}
    for name, call in waiting.items():
        if name in sys.modules:
            call(sys.modules[name])
    sys.meta_path.insert(0, _AfterImport(waiting))


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
