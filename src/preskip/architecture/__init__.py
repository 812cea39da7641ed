"""`preskip_<type>`: transformers' own architectures with the branch built in.

Importing this registers every type with AutoConfig, AutoModel and AutoModelForCausalLM; after `import preskip` that
happens when a config of one is first asked for (`preskip.registration`).
"""

from preskip.architecture import models
from preskip.architecture.config import branch_settings, config_class
from preskip.architecture.models import architecture, register
from preskip.model_types import TYPES

__all__ = ["TYPES", "architecture", "branch_settings", "config_class"]

register()


def __getattr__(name: str) -> type:
    """The classes by name, e.g. `PreskipLlamaForCausalLM`: what a baked checkpoint's stub imports."""
    return getattr(models, name)
