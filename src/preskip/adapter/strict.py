"""Loading by transformers and by PEFT: a Preskip adapter that is refused leaves the model as it was.

transformers' own `model.load_adapter` is made as strict as PEFT's loading, too: left alone it logs a missing tensor,
fills it with noise and goes on. Both run through no class of ours, so their methods are wrapped; other adapter types
pass through untouched. Wrapped, too, and for all adapter types, are two methods of PEFT's trained tokens, which fail
when another adapter is saved or loaded, and what takes another adapter out of a base on which branches stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import TrainableTokensWrapper
from transformers.integrations.peft import PeftAdapterMixin

from preskip.adapter.checkpoint import expected_tensors, missing_tensors, refuse
from preskip.adapter.config import PreskipConfig
from preskip.adapter.layer import PreskipLayer
from preskip.adapter.model import (
    base_model,
    forget_first_adapter,
    remove_adapter,
    remove_copies,
    state_of,
    wrappers,
)
from preskip.errors import PreskipError

# Settings of which a checkpoint's tensors show nothing.
_NOT_IN_TENSORS = ("activation", "enrich_attention", "skip_position")


def make_load_adapter_strict() -> None:
    """Wrap `load_adapter` of transformers and PEFT, and `PeftModel.from_pretrained`; to be called once."""
    mixin: Any = PeftAdapterMixin
    load = mixin.load_adapter

    @wraps(load)
    def strict(model: Any, *args: Any, **kwargs: Any) -> Any:
        return _load_adapter(load, model, args, kwargs)

    mixin.load_adapter = strict
    peft_model: Any = PeftModel
    from_pretrained, load_another = peft_model.from_pretrained.__func__, peft_model.load_adapter

    @wraps(from_pretrained)
    def from_pretrained_whole(cls: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        with _undone_if_refused(base_model(model)):
            return from_pretrained(cls, model, *args, **kwargs)

    @wraps(load_another)
    def load_another_whole(model: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        _check_settings(model, model_id, adapter_name, kwargs)
        with _undone_if_refused(base_model(model)):
            return load_another(model, model_id, adapter_name, *args, **kwargs)

    peft_model.from_pretrained = classmethod(from_pretrained_whole)
    peft_model.load_adapter = load_another_whole
    tokens: Any = TrainableTokensWrapper
    for name in ("adapter_state_dict", "adapter_state_dict_load_map"):
        setattr(tokens, name, _of_its_own(getattr(tokens, name)))
    tuner: Any = BaseTuner
    for name in ("merge_and_unload", "unload"):
        setattr(tuner, name, _branches_stay_known(getattr(tuner, name)))


def _branches_stay_known(method: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """PEFT deletes the table of a base whose adapter it merges or unloads: branches that stay there are put back."""

    @wraps(method)
    def taken_out(tuner: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        shared = getattr(tuner.model, "peft_config", None)
        base = method(tuner, *args, **kwargs)
        layers = [module for module in base.modules() if isinstance(module, PreskipLayer)]
        branches = {name for layer in layers for name in layer.settings}
        if shared and branches and not hasattr(base, "peft_config"):
            tuner.peft_config = dict(shared)  # its own names stay with it alone
            for name in shared.keys() - branches:
                del shared[name]
            base.peft_config = shared
        return base

    return taken_out


def _of_its_own(method: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """PEFT looks in every wrapper for the adapter it saves or loads: trained tokens of another adapter have nothing."""

    @wraps(method)
    def tensors(wrapper: Any, adapter_name: str, *args: Any) -> dict[str, Any]:
        return method(wrapper, adapter_name, *args) if adapter_name in wrapper._get_available_adapters() else {}

    return tensors


def _check_settings(model: Any, source: Any, name: str, kwargs: dict[str, Any]) -> None:
    """Refuse weights for an adapter that would compute something else with them: PEFT reads no config over a name."""
    own = model.peft_config.get(name)
    if not isinstance(own, PreskipConfig):
        return
    try:
        given = PeftConfig.from_pretrained(source, **model._split_kwargs(kwargs)[0])
    except PreskipError:
        raise
    except ValueError:  # no config there: weights alone are loaded, too
        return
    for setting in _NOT_IN_TENSORS if isinstance(given, PreskipConfig) else ():
        mine, theirs = getattr(own, setting), getattr(given, setting)
        if mine != theirs:
            raise PreskipError(
                f"adapter {name!r} has {setting}={mine!r}, {source} was trained with {theirs!r}: load it under another "
                "name"
            )


@contextmanager
def _undone_if_refused(model: Any) -> Iterator[None]:
    """Refused inside, an adapter leaves the model as it was; PEFT's error for a missing trained copy gets its words."""
    undo = _Undo(model)
    try:
        yield
    except Exception as error:
        lost = _missing_copy(model, error)
        undo()
        if lost:
            raise PreskipError(missing_tensors([lost])) from None
        raise


def _missing_copy(model: Any, error: Exception) -> str | None:
    """The key that an error of PEFT is about, where it is a tensor of a trained copy that the checkpoint lacks."""
    if not (isinstance(error, KeyError) and _preskip_adapters(model)):
        return None
    key = str(error.args[0])
    return key if any(f".{path}." in f".{key}" for path, _ in wrappers(model)) else None


def _load_adapter(load: Callable[..., Any], model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    undo = _Undo(model)
    if kwargs.get("hotswap") is True and undo.before:
        raise PreskipError(
            "Preskip adapters cannot be hot-swapped by PEFT, which does so for LoRA alone: load the other under its "
            "own name and switch with set_adapter, or copy its weights in place with set_peft_model_state_dict"
        )
    try:
        report = load(model, *args, **kwargs)
    except RuntimeError as error:
        wrong_shape = bool(undo.new()) and "ignore_mismatched_sizes" in str(error)
        undo()
        if not wrong_shape:
            raise
        # Once more, only to learn which tensor it was: the error does not say.
        report = load(model, *args, **{**kwargs, "ignore_mismatched_sizes": True})
    except Exception:
        undo()
        raise
    try:
        for name in undo.new():
            _check(model, name, report)
    except PreskipError:
        undo()
        raise
    return report


def _check(model: torch.nn.Module, name: str, report: Any) -> None:
    """Raise what `preskip.adapter.checkpoint.check_tensors` raises, from transformers' report of a finished load."""
    expected, parameters = expected_tensors(model, name), dict(model.named_parameters())
    mismatched = sorted(report.mismatched_keys)
    heads = {key for key in report.missing_keys if f".modules_to_save.{name}." in f".{key}"}
    if unread := {key.replace(f".modules_to_save.{name}", "") for key in heads} & set(report.unexpected_keys):
        raise PreskipError(
            f"transformers {transformers.__version__} does not read {min(unread)}, which was trained with the adapter: "
            "load it with PeftModel.from_pretrained"
        )
    refuse(
        missing=(expected.keys() & report.missing_keys | heads) - {key for key, *_ in mismatched},
        extra=report.unexpected_keys,
        mismatched=mismatched,
        tensors={key: parameters[key] for key in expected},
    )


def _preskip_adapters(model: Any) -> set[str]:
    configs = getattr(model, "peft_config", None) or {}
    return {name for name, config in configs.items() if isinstance(config, PreskipConfig)}


class _Undo:
    """Takes out the Preskip adapters that a model has got since this was made; others are as before (`state_of`)."""

    def __init__(self, model: Any) -> None:
        self.model, self.before = model, _preskip_adapters(model)
        self.put_back = state_of(model)

    def new(self) -> set[str]:
        return _preskip_adapters(self.model) - self.before

    def __call__(self) -> None:
        new = self.new()
        for name in new:
            remove_adapter(self.model, name)
            remove_copies(self.model, name)
            del self.model.peft_config[name]
        if new:
            self.put_back()
        if new and not self.model.peft_config:
            del self.model.peft_config
            forget_first_adapter(self.model)
