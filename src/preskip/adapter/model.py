"""`PreskipModel`: the PEFT tuner that puts a `PreskipLayer` into every chosen attention module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, _get_submodules
from torch import nn

from preskip.adapter.checkpoint import check_tensors
from preskip.adapter.config import PreskipConfig
from preskip.adapter.layer import CANNOT_MERGE, PreskipLayer
from preskip.attach import CHILD, Sites, attach, coverage, detach, find_sites, input_width, tap_of, text_decoder
from preskip.errors import PreskipError


class PreskipModel(BaseTuner):
    """Inserts a pre-projection and a content skip (arXiv 2604.10791) into the attention of a frozen model.

    Made by `peft.get_peft_model(model, PreskipConfig())`.

    Raises:
        PreskipError: a chosen layer would get no branch or more than one, a target is no attention module, or the
            model's blocks are not recognised.
    """

    # With its dot: matches what is inside the branch, not the branch itself.
    prefix = f"{CHILD}."
    tuner_layer_cls = PreskipLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Resolve and check the targets, then inject; nothing is changed if a check fails."""
        config: PreskipConfig = self.peft_config[adapter_name]
        try:
            self._resolve_targets(model, config)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            # `add_adapter` files the config before injecting; take it out again, so that the model is as it was.
            if len(self.peft_config) > 1:
                self.peft_config.pop(adapter_name, None)
            raise
        self._watch_loading()

    def _resolve_targets(self, model: nn.Module, config: PreskipConfig) -> None:
        by_user = config.target_modules is not None
        sites = find_sites(model) if not by_user else None
        if sites is not None:
            _check_complete(model, sites, config)
            _set_default_targets(model, sites, config)
        keys = [key for key, _ in model.named_modules() if key]
        matched = [key for key in keys if check_target_module_exists(config, key)]
        if not matched:
            raise PreskipError(
                f"target_modules={config.target_modules!r} match nothing in {type(model).__name__}"
                f"{_listed_attentions(model)}"
            )
        for key in matched:
            _check_is_attention(key, model.get_submodule(key))
        if sites is not None and config.exclude_modules is None and not model_is_encoder_decoder(model):
            problem = coverage(matched, _chosen_layers(sites, config))
            if problem:
                raise PreskipError(f"{type(model).__name__} would be adapted in part: {problem}")
        nested = [key for key in matched if any(key.startswith(f"{other}.") for other in matched)]
        if nested:
            raise PreskipError(f"{nested[0]} lies inside another target: name one module per layer in target_modules")

    def _create_and_replace(
        self,
        peft_config: PreskipConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        layer = getattr(target, CHILD, None)
        tap = tap_of(parent, target_name, peft_config.skip_position)
        if not isinstance(layer, PreskipLayer):
            hidden_size = getattr(getattr(text_decoder(self.model), "config", None), "hidden_size", None)
            layer = PreskipLayer(target, input_width(target, hidden_size))
            attach(target, layer, tap)
            layer.tap = [tap]
        elif layer.tap[0] is not tap:
            raise PreskipError("all Preskip adapters of a model must share one skip_position")
        layer.update_layer(
            adapter_name, peft_config.branch_settings(), self.active_adapters, peft_config.inference_mode
        )

    def _watch_loading(self) -> None:
        """Check every checkpoint that `load_state_dict` brings in, once per model."""
        if not getattr(self, "_loading_is_watched", False):
            self._loading_is_watched = True
            self.register_load_state_dict_pre_hook(_check_loaded)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        """Only the branch's own tensors, also where LoRA is stacked with it (peft >= 0.21)."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return {key: value for key, value in found.items() if f".{cls.prefix}" in f".{key}"}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Refuse tensors that have no place in this adapter, before any is loaded (peft >= 0.21)."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_tensors(remapped, _expected_tensors(model, adapter_name), allow_extra=False)
        return remapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        if kwargs.pop("adapter_names", None) is not None:
            raise PreskipError("Preskip does not support a different adapter per row (adapter_names)")
        yield

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        for module in list(self.model.modules()):
            if isinstance(getattr(module, CHILD, None), PreskipLayer):
                detach(module)
        for key in [key for key, module in self.model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]:
            parent, target, name = _get_submodules(self.model, key)
            original = target.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
            setattr(parent, name, original)
        if hasattr(self.model, "peft_config") and not _has_tuner_layers(self.model):
            del self.model.peft_config
        return self.model


def model_is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has an encoder and a decoder stack, so that a layer index names two blocks."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _has_tuner_layers(model: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _layer_list(config: PreskipConfig) -> list[int] | None:
    layers = config.layers_to_transform
    return [layers] if isinstance(layers, int) else (list(layers) if layers is not None else None)


def _chosen_layers(sites: Sites, config: PreskipConfig) -> list[int]:
    layers = _layer_list(config)
    return sites.layers if layers is None else layers


def _check_complete(model: nn.Module, sites: Sites, config: PreskipConfig) -> None:
    chosen = _layer_list(config)
    if chosen is not None:
        unknown = [layer for layer in chosen if layer not in sites.layers]
        if unknown or not chosen:
            available = f"{sites.layers[0]} to {sites.layers[-1]}"
            raise PreskipError(
                f"layers_to_transform={chosen} is not possible: {type(model).__name__} has attention in {available}"
            )
    elif sites.blocks_without:
        raise PreskipError(
            f"{type(model).__name__} has blocks without a known self-attention: {', '.join(sites.blocks_without[:8])}; "
            f"give layers_to_transform={sites.layers} to adapt only the others"
        )


def _set_default_targets(model: nn.Module, sites: Sites, config: PreskipConfig) -> None:
    """Fill `target_modules`: names where they hit only the sites, a regular expression where a tower has them too."""
    targets = {site.target for site in sites.attentions}
    names = {site.name for site in sites.attentions}
    hits = {key for key, _ in model.named_modules() if any(key.endswith(f".{target}") for target in targets)}
    if hits == names:
        config.target_modules = targets  # type: ignore[assignment]
        return
    layers = _layer_list(config)
    stacks = "|".join(re.escape(stack) for stack in sorted({site.stack for site in sites.attentions}))
    index = r"\d+" if layers is None else "|".join(map(str, layers))
    config.target_modules = rf"({stacks})\.({index})\.({'|'.join(re.escape(target) for target in sorted(targets))})"
    config.layers_to_transform = None


def _check_is_attention(key: str, module: nn.Module) -> None:
    inner = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    has_own_weight = hasattr(inner, "in_features") or isinstance(inner, (nn.Embedding, nn.ModuleList))
    if has_own_weight or not any(True for _ in module.children()):
        raise PreskipError(
            f"{key} ({type(inner).__name__}) is not an attention module: target the module that holds the q/k/v "
            "projections, e.g. self_attn"
        )


def _listed_attentions(model: nn.Module) -> str:
    try:
        sites = find_sites(model)
    except PreskipError:
        return ""
    return f"; its attentions are called {', '.join(sorted({site.target for site in sites.attentions}))}"


def _expected_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Size]:
    expected = {}
    for path, module in model.named_modules():
        if isinstance(module, PreskipLayer):
            for part, linear in module.linears(adapter_name).items() if adapter_name in module.settings else ():
                expected[".".join(filter(None, (path, part, adapter_name, "weight")))] = linear.weight.shape
    return expected


def _check_loaded(tuner: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """Load-state-dict pre-hook: an adapter that occurs in a checkpoint must occur whole, finite and in shape."""
    own = {key.removeprefix(prefix): value for key, value in state_dict.items() if f".{CHILD}." in key}
    names = {name for module in tuner.modules() if isinstance(module, PreskipLayer) for name in module.settings}
    known: dict[str, torch.Size] = {}
    for name in names:
        expected = _expected_tensors(tuner, name)
        known.update(expected)
        if any(f".{name}.weight" in key for key in own):
            check_tensors({key: own[key] for key in own if f".{name}." in key}, expected, allow_extra=True)
    extra = sorted(own.keys() - known.keys())
    if extra:
        raise PreskipError(f"the checkpoint holds a tensor that this adapter has no place for: {extra[0]}")
