"""transformers' own `model.load_adapter`, made as strict for Preskip adapters as PEFT's loading is.

Left alone it logs a missing tensor, fills it with noise and goes on. That loading runs through no class of ours, so the
method is wrapped; other adapter types pass through untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from transformers.integrations.peft import PeftAdapterMixin

from preskip.adapter.checkpoint import refuse
from preskip.adapter.config import PreskipConfig
from preskip.adapter.model import expected_tensors, remove_adapter
from preskip.errors import PreskipError


def make_load_adapter_strict() -> None:
    """Wrap `transformers.PreTrainedModel.load_adapter`; to be called once."""
    mixin: Any = PeftAdapterMixin
    load = mixin.load_adapter

    @wraps(load)
    def strict(model: Any, *args: Any, **kwargs: Any) -> Any:
        return _load_adapter(load, model, args, kwargs)

    mixin.load_adapter = strict


def _load_adapter(load: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    before = set(_preskip_adapters(model))
    if kwargs.get("hotswap") is True and before:
        raise PreskipError(
            "Preskip adapters cannot be hot-swapped by PEFT, which does so for LoRA alone: load the other under its "
            "own name and switch with set_adapter, or copy its weights in place with set_peft_model_state_dict"
        )
    try:
        report = load(model, *args, **kwargs)
    except RuntimeError as error:
        wrong_shape = bool(_preskip_adapters(model) - before) and "ignore_mismatched_sizes" in str(error)
        _undo(model, before)
        if not wrong_shape:
            raise
        # Once more, only to learn which tensor it was: the error does not say.
        report = load(model, *args, **{**kwargs, "ignore_mismatched_sizes": True})
    except Exception:
        _undo(model, before)
        raise
    try:
        for name in _preskip_adapters(model) - before:
            _check(model, name, report)
    except PreskipError:
        _undo(model, before)
        raise
    return report


def _check(model: torch.nn.Module, name: str, report: Any) -> None:
    """Raise what `preskip.adapter.checkpoint.check_tensors` raises, from transformers' report of a finished load."""
    expected, parameters = expected_tensors(model, name), dict(model.named_parameters())
    mismatched = sorted(report.mismatched_keys)
    refuse(
        missing=(expected.keys() & report.missing_keys) - {key for key, *_ in mismatched},
        extra=report.unexpected_keys,
        mismatched=mismatched,
        tensors={key: parameters[key] for key in expected},
    )


def _preskip_adapters(model: Any) -> set[str]:
    configs = getattr(model, "peft_config", None) or {}
    return {name for name, config in configs.items() if isinstance(config, PreskipConfig)}


def _undo(model: Any, before: set[str]) -> None:
    for name in _preskip_adapters(model) - before:
        remove_adapter(model, name)
        del model.peft_config[name]
        if not model.peft_config:
            del model.peft_config
            model._hf_peft_config_loaded = False
