"""Preskip: a non-linear pre-projection and a content skip for the attention of any Hugging Face transformer.

Importing the package registers the PEFT method, at once where peft is loaded already, else the moment it is, and the
`preskip_<type>` architectures, the moment a config of such a type is asked for: both take seconds to import, and
`preskip --help` should not. `PreskipConfig` is for `peft.get_peft_model`, `bake` makes a self-contained checkpoint of
the result; `PreskipBranch` is the building block (arXiv 2604.10791).
"""

import importlib
from typing import TYPE_CHECKING

from preskip import registration
from preskip.errors import PreskipError
from preskip.version import __version__

if TYPE_CHECKING:
    from preskip.adapter import PreskipConfig
    from preskip.baking import bake
    from preskip.branch import PreskipBranch
    from preskip.branch_settings import BranchSettings
    from preskip.optimizing import optimize

__all__ = ["BranchSettings", "PreskipBranch", "PreskipConfig", "PreskipError", "__version__", "bake", "optimize"]

_HOMES = {
    "BranchSettings": "preskip.branch_settings",
    "PreskipBranch": "preskip.branch",
    "PreskipConfig": "preskip.adapter",
    "bake": "preskip.baking",
    "optimize": "preskip.optimizing",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'preskip' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


registration.install()
