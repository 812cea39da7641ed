"""Models with the branch built in: a mixin over transformers' own classes, one family per base type.

The branch is the child `preskip` of each attention module with the same hooks and key names as the adapter's, so that
an adapter becomes a model by renaming keys. The base's weights keep their names, and at the same seed their values.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    modeling_utils,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
)

from preskip.architecture.config import adapter_settings, branch_settings, config_class
from preskip.architecture.several import PicksByName, SeveralBranches
from preskip.architecture.stub import auto_map
from preskip.attach import CHILD, attach, tap_of
from preskip.branch import BranchSettings, PreskipBranch, initialise
from preskip.errors import PreskipError
from preskip.model_types import PREFIX, TYPES
from preskip.peers.insert import attach_peers
from preskip.peers.place import PeerModule
from preskip.peers.value_embed import ValueEmbed
from preskip.quantizing import quantize_layers
from preskip.sites import find_sites, input_width

# The class with branches of each base class: the inner model of a ForCausalLM is made as the base's.
_WITH_BRANCH: dict[type, type] = {}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The classes of one base type.

    Attributes:
        base_type: transformers' model type.
        config, model, causal_lm: the classes with branches.
    """

    base_type: str
    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]

    @property
    def auto_map(self) -> dict[str, str]:
        """What the config of a stored model says, so that it opens where nothing has imported preskip."""
        return auto_map(self.config, self.model, self.causal_lm)


class BranchMixin:
    """Attaches a branch to the self-attention of each chosen layer after the base class has built the model."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        for child in model.children():
            # As AutoModel would make it: weight initialisation is asked of each PreTrainedModel for its own modules.
            if type(child) in _WITH_BRANCH:
                child.__class__ = _WITH_BRANCH[type(child)]
                _record_outputs(child)
        _attach_all(model, config)
        if config.preskip_peers:
            attach_peers(model, config.preskip_peers)
        model.post_init()  # again: the first one has run before there were branches, and keeps what it has initialised
        if config.preskip_keep_float32:
            model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), CHILD}

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **kwargs: Any
    ) -> Any:
        """As transformers', but refused where the model has other tables by token.

        Raises:
            PreskipError: see above.
        """
        model: Any = self
        is_other = pad_to_multiple_of or new_num_tokens not in (None, model.config.vocab_size)
        if is_other and any(isinstance(module, ValueEmbed) for module in model.modules()):
            raise PreskipError(
                "value embeddings have a row per token, which does not grow with the vocabulary: give vocab_size to "
                "the config before the model is made"
            )
        base: Any = super()
        return base.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Does nothing: saving would copy this file, which is none without its package, beside the checkpoint."""

    def _init_weights(self, module: nn.Module) -> None:
        part: tuple[str, BranchSettings] | None = getattr(module, "preskip_part", None)
        if part is not None:
            initialise(part[0], module.weight, part[1])  # type: ignore[arg-type]
        elif isinstance(module, PeerModule):
            module.reset_parameters()
        else:
            super()._init_weights(module)  # type: ignore[misc]


def _record_outputs(model: PreTrainedModel) -> None:
    """Tell transformers which outputs (hidden states, attentions) a model of this class can return.

    Its table is by class name, and a model enters it while it is made.
    """
    table: dict[str, Any] = getattr(modeling_utils, "_CAN_RECORD_REGISTRY", {})
    dict.__setitem__(table, str(type(model)), getattr(model, "_can_record_outputs", None))


def _attach_all(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    settings, several, layers = branch_settings(config), adapter_settings(config), config.preskip_layers
    for site in find_sites(model).attentions:
        if layers is not None and site.layer not in layers:
            continue
        attention = model.get_submodule(site.name)
        width = input_width(attention, config.hidden_size)
        branch: Any = SeveralBranches(width, several) if several else PreskipBranch(width, settings)
        if torch.get_default_dtype() == torch.bfloat16 and not config.preskip_keep_float32:
            branch.to(torch.bfloat16)  # as the rest of the model is made and loaded
        for own in branch.values() if several else (branch,):
            if config.preskip_quantize:
                quantize_layers(own)
                continue
            for part, linear in own.linears.items():
                # On the Linear: transformers calls `_init_weights` only for modules with weights of their own.
                linear.preskip_part = (part, own.settings)
        attach(attention, branch, tap_of(model, site.name, config.preskip_skip_position))


@cache
def architecture(base_type: str) -> Architecture:
    """The classes of a base type, registered with the Auto classes.

    Args:
        base_type: one of `TYPES`, also with `preskip_` before it.

    Raises:
        PreskipError: a type that has no such architecture.
    """
    name = base_type.removeprefix(PREFIX)
    if name != base_type:
        return architecture(name)
    if name not in TYPES:
        raise PreskipError(f"there is no preskip_{name} architecture: choose one of {', '.join(TYPES)}")
    base = CONFIG_MAPPING[name]
    config = config_class(name)
    AutoConfig.register(config.model_type, config)
    classes = []
    for mapping, auto in ((MODEL_MAPPING, AutoModel), (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM)):
        model: Any = mapping[base]
        picks = (PicksByName,) if auto is AutoModelForCausalLM else ()
        with_branch = type(
            f"Preskip{model.__name__}",
            (*picks, BranchMixin, model),
            {
                "config_class": config,
                "__module__": __name__,
                "__doc__": f"{model.__name__} with a branch per layer.",
                # Loaded in float16 the branch's weights stay fp32, since its inner features may overflow. Quantisers
                # read this, too, as a pattern from the start of the name.
                "_keep_in_fp32_modules": [*(model._keep_in_fp32_modules or ()), rf".*\.{CHILD}"],
            },
        )
        _WITH_BRANCH[model] = with_branch
        auto.register(config, with_branch)
        classes.append(with_branch)
        _copy_conversion(model.__name__, with_branch.__name__)
    _copy_conversion(name, config.model_type)
    # `AutoModelForCausalLM.register` leaves this table alone, by which Trainer knows whose labels to shift.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type] = classes[1].__name__
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    if base in TOKENIZER_MAPPING:
        TOKENIZER_MAPPING.register(config, TOKENIZER_MAPPING[base])
    for made in (config, *classes):
        setattr(sys.modules[__name__], made.__name__, made)
    return Architecture(base_type=name, config=config, model=classes[0], causal_lm=classes[1])


def register() -> None:
    """Register every type of `TYPES` with the Auto classes; a second call does nothing."""
    for base_type in TYPES:
        architecture(base_type)


def _copy_conversion(base: str, ours: str) -> None:
    """Let our class or type read checkpoints whose keys transformers renames or fuses on loading (Mixtral's)."""
    conversion = get_checkpoint_conversion_mapping(base)
    if conversion is not None:
        register_checkpoint_conversion_mapping(ours, conversion, overwrite=True)
