"""The PEFT method: `PreskipConfig` for `get_peft_model`, registered with PEFT on import."""

# First and alone: loading peft is what calls for this package (see preskip/__init__.py), so that it must be complete.
import peft  # noqa: F401  isort: skip

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from preskip.adapter.config import PreskipConfig, peft_type
from preskip.adapter.layer import PreskipLayer
from preskip.adapter.model import PreskipModel, base_model
from preskip.adapter.strict import make_load_adapter_strict

__all__ = ["PreskipConfig", "PreskipLayer", "PreskipModel", "base_model"]

if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="preskip", config_cls=PreskipConfig, model_cls=PreskipModel, prefix=PreskipModel.prefix)
    make_load_adapter_strict()
