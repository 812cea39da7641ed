"""The model that an adapter sits on."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn


def base_model(model: nn.Module) -> Any:
    """The base inside a PEFT model (`PeftModel.get_base_model`), with its adapters; any other model as it is."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
