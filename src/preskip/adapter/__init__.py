"""The PEFT method: `PreskipConfig` for `get_peft_model`, registered with PEFT on import."""

# First and alone: loading peft is what calls for this package (see preskip/__init__.py), so that it must be complete.
import peft  # noqa: F401  isort: skip

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import constants, register_peft_method

from preskip.adapter.config import PreskipConfig, peft_type
from preskip.adapter.layer import PreskipLayer
from preskip.adapter.model import PreskipModel
from preskip.adapter.strict import make_load_adapter_strict
from preskip.types import PREFIX, TYPES

__all__ = ["PreskipConfig", "PreskipLayer", "PreskipModel"]

if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="preskip", config_cls=PreskipConfig, model_cls=PreskipModel, prefix=PreskipModel.prefix)
    make_load_adapter_strict()

# A baked model is a base again: other adapters find its modules as they find the base type's.
for name, targets in vars(constants).items():
    if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(targets, dict):
        targets.update({f"{PREFIX}{base}": targets[base] for base in TYPES if base in targets})
