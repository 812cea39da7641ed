"""`PreskipModel`: the PEFT tuner that puts a `PreskipLayer` into every chosen attention module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft import AdaptionPromptModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from preskip.adapter.checkpoint import check_loaded, check_tensors, expected_tensors
from preskip.adapter.config import PreskipConfig
from preskip.adapter.layer import CANNOT_MERGE, PreskipLayer
from preskip.adapter.names import check_adapter_name
from preskip.adapter.targets import (
    FILLED_IN,
    as_given,
    check_is_attention,
    layer_list,
    listed_attentions,
    of_pattern,
    remember_given,
    resolve_modules_to_save,
    set_default_targets,
)
from preskip.attach import CHILD, attach, detach, forget_compiled, remove_copied_taps, tap_of
from preskip.errors import PreskipError, some
from preskip.rows import check_free, check_names, check_rows
from preskip.site_check import check_role
from preskip.sites import choose_layers, coverage, find_sites, input_width, site_of, text_decoder


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
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012
    _row_names: list[str] | None = None

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # PEFT would overwrite the other adapter's entry, and that adapter could not be saved any more.
        if isinstance(model, nn.Module) and adapter_name in (getattr(model, "peft_config", None) or {}):
            raise PreskipError(
                f"{type(model).__name__} has an adapter named {adapter_name!r} already: give another adapter_name, or "
                "unload() the first"
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """Resolve and check the targets, then inject; model and config are as before if anything fails."""
        self._check_name(model, adapter_name)
        config: Any = as_given(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        before = {name: getattr(config, name) for name in (*FILLED_IN, "modules_to_save")}
        put_back = state_of(model)
        try:
            self._resolve_targets(model, config)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            remove_adapter(model, adapter_name)
            remove_copies(model, adapter_name)
            self.peft_config.pop(adapter_name, None)
            for name, value in before.items():
                setattr(config, name, value)
            put_back()
            forget_first_adapter(model)
            raise
        remember_given(config, before)
        self._watch_loading()
        forget_compiled()

    def _check_name(self, model: nn.Module, adapter_name: str) -> None:
        try:
            check_adapter_name(adapter_name, model)
        except PreskipError:
            self.peft_config.pop(adapter_name, None)
            forget_first_adapter(model)
            raise

    def _resolve_targets(self, model: nn.Module, config: PreskipConfig) -> None:
        """Fill in the default targets and refuse, before anything is changed, what cannot be adapted whole."""
        sites = of_pattern(find_sites(model), config.layers_pattern) if config.target_modules is None else None
        if sites is not None and sites.blocks_without and config.layers_to_transform is None:
            _check_roles(model, [site.name for site in sites.attentions])  # before advice to choose among them
        layers = layer_list(config)
        if layers == []:
            raise PreskipError("layers_to_transform=[] is not possible: name at least one layer, or None for all")
        if sites is not None or isinstance(layers, str):
            layers = choose_layers(model, sites or find_sites(model), layers)
        if isinstance(config.layers_to_transform, str):
            config.layers_to_transform = layers
        if sites is not None:
            set_default_targets(model, sites, config)
        inside = tuple(f"{key}." for key, module in model.named_modules() if isinstance(module, PreskipLayer))
        keys = [key for key, _ in model.named_modules() if key and not f"{key}.".startswith(inside)]
        matched = [key for key in keys if check_target_module_exists(config, key)]
        if not matched:
            raise PreskipError(
                f"target_modules={config.target_modules!r} match nothing in {type(model).__name__}"
                f"{'' if layers is None else f' with layers_to_transform={layers}'}{listed_attentions(model)}"
            )
        for key in matched:
            check_is_attention(key, model.get_submodule(key))
            site_of(model, key)
        nested = [key for key in matched if any(key.startswith(f"{other}.") for other in matched)]
        if nested:
            raise PreskipError(f"{nested[0]} lies inside another target: name one module per layer in target_modules")
        _check_roles(model, matched)
        if sites is not None and config.exclude_modules is None:
            problem = coverage(matched, sites, sites.layers if layers is None else layers)
            if problem:
                raise PreskipError(f"{type(model).__name__} would be adapted in part: {problem}")
        for layer in layers or ():
            if not any(f".{layer}." in f".{key}." for key in matched) and config.exclude_modules is None:
                raise PreskipError(f"layers_to_transform: layer {layer} gets no branch, only {', '.join(matched)}")
        for key in matched:
            self._placement(model, key, config)
        resolve_modules_to_save(model, keys, config)

    def _placement(self, model: nn.Module, key: str, config: PreskipConfig) -> tuple[int, nn.Module | None]:
        """Width and tap of the branch at one attention, by its path in the model."""
        target = model.get_submodule(key)
        hidden_size = getattr(getattr(text_decoder(model), "config", None), "hidden_size", None)
        width, tap = input_width(target, hidden_size), tap_of(model, key, config.skip_position)
        layer = getattr(target, CHILD, None)
        if layer is not None and not isinstance(layer, PreskipLayer):
            raise PreskipError(
                f"{key} has its own branch already ({type(model).__name__}): train that, or adapt the base it came from"
            )
        if isinstance(layer, PreskipLayer) and layer.settings:
            if not any(layer.tap is inside for inside in ([None] if tap is None else tap.modules())):
                raise PreskipError(
                    f"skip_position={config.skip_position!r} is not possible: the model has a Preskip adapter with the "
                    "other position, and all must share one"
                )
        elif isinstance(tap, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise PreskipError(
                f"skip_position={config.skip_position!r} is not possible: another adapter trains the module behind "
                f"{key} already ({type(tap).__name__}); add the Preskip adapter first"
            )
        config.branch_settings().shapes(width)
        return width, tap

    def _create_and_replace(  # type: ignore[override]
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
        if isinstance(layer, PreskipLayer) and not layer.settings:  # PEFT deletes adapters, and leaves their layer
            detach(target)
            layer = None
        if not isinstance(layer, PreskipLayer):
            width, tap = self._placement(self.model, current_key, peft_config)
            layer = PreskipLayer(target, width, tap)
            attach(target, layer, tap)
        layer.update_layer(
            adapter_name, peft_config.branch_settings(), self.active_adapters, peft_config.inference_mode
        )

    def _watch_loading(self) -> None:
        """Check every checkpoint that `load_state_dict` brings in, once per model."""
        if not getattr(self, "_loading_is_watched", False):
            self._loading_is_watched = True
            self.register_load_state_dict_pre_hook(check_loaded)

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        """Only the branch's own tensors, also where LoRA is stacked with it (peft >= 0.21)."""
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        expected = expected_tensors(model, adapter_name)
        # PEFT leaves out what other adapters have by the names in its table, which may lack some.
        own = {key: found[key] for key in expected if key in found}
        if not state_dict:  # a process that holds no part of a sharded model gives nothing
            return own
        if not expected:
            raise PreskipError(
                f"adapter {adapter_name!r} has no branch in this model, so there is nothing to save: it was unloaded; "
                "name the adapters to save with selected_adapters=[...]"
            )
        copies = [getattr(wrapper, "modules_to_save", ()) for _, wrapper in wrappers(model)]
        if config.modules_to_save and not any(adapter_name in names for names in copies):
            raise PreskipError(
                f"adapter {adapter_name!r} trains {', '.join(config.modules_to_save)} too, and this model has no copy "
                "of that any more: it went when another adapter was merged or unloaded; save before"
            )
        if missing := sorted(expected.keys() - own.keys()):
            raise PreskipError(
                f"adapter {adapter_name!r} cannot be saved whole: {some(missing, 1)} would be left out, as another "
                f"adapter ({', '.join(unwanted_adapter_names) or 'none'}) has a part of its name; load that under "
                "another name"
            )
        return own

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Refuse tensors that have no place in this adapter, before any is loaded (peft >= 0.21)."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_tensors(remapped, expected_tensors(model, adapter_name), allow_extra=False)
        return remapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        """PEFT's mixed batches: with `adapter_names`, one per row or one for all, each row has its adapter's branch."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise PreskipError("adapter_names is for inference: call model.eval() first")
        layers = [module for module in self.modules() if isinstance(module, PreskipLayer)]
        names = check_names(names, sorted({name for layer in layers for name in layer.settings}))
        if any(isinstance(module, AuxiliaryTrainingWrapper) for module in self.modules()):
            raise PreskipError("adapter_names does not reach modules_to_save: use one adapter at a time")
        if _others_compute(self.model):
            raise PreskipError(
                "adapter_names does not reach adapters of another kind on this base: unload them, or take them in with "
                "merge_and_unload()"
            )
        check_rows(names, args, kwargs)
        check_free(self._row_names)
        try:
            self._row_names = names
            for layer in layers:
                layer.row_names = names
            yield
        finally:
            self._row_names = None
            for layer in layers:
                layer.row_names = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's; here PEFT's classes per task show the inputs, which they keep from the method above."""
        if self._row_names is not None:
            check_rows(self._row_names, args, kwargs)
        return super().forward(*args, **kwargs)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a weighted sum of weights is no weighted sum of branches.

        Raises:
            PreskipError: with what is possible instead.
        """
        raise PreskipError(
            "Preskip adapters cannot be combined into one: a branch is not linear in its weights; several active at "
            "once add up, as after model.base_model.set_adapter(['a', 'b'])"
        )

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def _unload_and_optionally_merge(  # type: ignore[override]
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
        own = {name for name, config in self.peft_config.items() if isinstance(config, PreskipConfig)}
        for path, wrapper in wrappers(self.model):
            copies = set(getattr(wrapper, "modules_to_save", ()))
            if copies and copies <= own:
                trained = wrapper.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
                self.model.set_submodule(path, trained)
                continue
            for name in copies & own:  # those of adapters that stay are theirs
                _delete_copy(wrapper, name)
        remove_copied_taps(self.model)
        if hasattr(self.model, "peft_config"):
            if _has_tuner_layers(self.model):
                self._leave_shared_names()
            else:
                del self.model.peft_config
        return self.model

    def _leave_shared_names(self) -> None:
        """Take the branches' names out of the table that all adapters of this base share; this model keeps its own."""
        shared: Any = self.model.peft_config
        self.peft_config = dict(shared)
        for name in [name for name, config in shared.items() if isinstance(config, PreskipConfig)]:
            del shared[name]


def base_model(model: nn.Module) -> Any:
    """The base inside a PEFT model, with its adapters; any other model as it is.

    `PeftModel.get_base_model` is the same, and fails while no adapter is active, as after `delete_adapter`.
    """
    inner: Any = model.base_model if isinstance(model, PeftModel) else model
    return inner.model if isinstance(inner, (BaseTuner, AdaptionPromptModel)) else inner


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take one adapter's branches out of a model; an attention whose last branch goes is as it was before."""
    for module in list(model.modules()):
        layer = getattr(module, CHILD, None)
        if isinstance(layer, PreskipLayer):
            if adapter_name in layer.settings:
                layer.delete_adapter(adapter_name)
            if not layer.settings:
                detach(module)


def state_of(model: nn.Module) -> Callable[[], None]:
    """What a refused adapter may have changed beside its own parts: which weights train, which adapters are active.

    Returns:
        A function that puts both back as they are now.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    active = [(module, module._active_adapter) for module in model.modules() if isinstance(module, kinds)]

    def put_back() -> None:
        for module, names in active:
            module._active_adapter = names
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)

    return put_back


def remove_copies(model: nn.Module, adapter_name: str) -> None:
    """Take one adapter's copies of `modules_to_save` out of a model."""
    for path, wrapper in wrappers(model):
        copies: Any = getattr(wrapper, "modules_to_save", {})
        if set(copies) == {adapter_name}:
            model.set_submodule(path, wrapper.original_module)
        elif adapter_name in copies:
            _delete_copy(wrapper, adapter_name)


def wrappers(model: nn.Module) -> list[tuple[str, Any]]:
    """The modules of which PEFT trains copies, by path."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]


def _delete_copy(wrapper: Any, adapter_name: str) -> None:
    wrapper.delete_adapter(adapter_name, [other for other in wrapper.active_adapters if other != adapter_name])


def forget_first_adapter(model: nn.Module) -> None:
    """transformers' add_adapter marks the model before it injects, and would take the next try for a second adapter."""
    if getattr(model, "_hf_peft_config_loaded", False) and not getattr(model, "peft_config", None):
        model._hf_peft_config_loaded = False  # type: ignore[assignment]


def _others_compute(model: nn.Module) -> bool:
    """Whether an adapter of another kind takes part, outside the branches."""
    branches = [module for module in model.modules() if isinstance(module, PreskipLayer)]
    inside = {id(module) for branch in branches for module in branch.modules()}
    others = (module for module in model.modules() if isinstance(module, BaseTunerLayer) and id(module) not in inside)
    return any(
        not layer.disable_adapters and set(layer.active_adapters) & layer._get_available_adapters() for layer in others
    )


def _has_tuner_layers(model: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _check_roles(model: nn.Module, paths: list[str]) -> None:
    """`check_role` of the attentions that have no branch yet."""
    check_role(model, [path for path in paths if not hasattr(model.get_submodule(path), CHILD)])
