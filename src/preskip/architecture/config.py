"""Configs of the architectures: a base config with the branch's fields, each prefixed with `preskip_`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Optional, get_type_hints

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from preskip.architecture.stub import STUB, stub_text
from preskip.branch_settings import SKIP_POSITIONS, BranchSettings
from preskip.errors import PreskipError
from preskip.model_types import PREFIX
from preskip.peers.insert import check_peers
from preskip.quantizing import QUANTIZED

# Type and default of every field that a config has beside its base's. From scratch nothing is there that an identity
# would have to keep: the paper's initialisation is the default.
_FIELDS: dict[str, tuple[Any, Any]] = {
    **{
        PREFIX + field.name: (get_type_hints(BranchSettings)[field.name], field.default)
        for field in fields(BranchSettings)
    },
    "preskip_init_weights": (str, "paper"),
    "preskip_skip_position": (str, "attention"),
    "preskip_layers": (Optional[list[int]], None),
    "preskip_keep_float32": (bool, False),
    "preskip_adapters": (Optional[dict[str, Any]], None),
    "preskip_first_adapter": (Optional[str], None),
    "preskip_quantize": (Optional[str], None),
    "preskip_peers": (Optional[dict[str, Any]], None),
}


def branch_settings(config: PreTrainedConfig) -> BranchSettings:
    """What the branches of a model of this config are made of.

    Raises:
        PreskipError: a value is out of range or two fields contradict each other.
    """
    try:
        return BranchSettings.from_object(config, PREFIX)
    except PreskipError as error:
        raise PreskipError(f"{config.model_type} config, field {PREFIX}{error}") from None


def adapter_settings(config: Any) -> dict[str, BranchSettings]:
    """What the branches of each adapter are made of, by name, the first one first; {} where there is one alone.

    Raises:
        PreskipError: a value is out of range or two fields contradict each other.
    """
    given = config.preskip_adapters or {}
    # A config's file has its keys in the alphabet's order.
    names = sorted(given, key=lambda name: name != config.preskip_first_adapter)
    return {name: BranchSettings(**given[name]) for name in names}


class BranchConfigMixin:
    """Checks the `preskip_*` fields; a config read from a base checkpoint starts its branches at identity."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        config: Any = self
        for settings in (branch_settings(config), *adapter_settings(config).values()):
            settings.shapes(config.hidden_size)
        check_peers(config.preskip_peers or {})
        position, layers, count = config.preskip_skip_position, config.preskip_layers, config.num_hidden_layers
        if position not in SKIP_POSITIONS:
            raise PreskipError(
                f"preskip_skip_position={position!r} is not possible: choose {' or '.join(SKIP_POSITIONS)}"
            )
        if config.preskip_quantize not in (None, *QUANTIZED):
            raise PreskipError(
                f"preskip_quantize={config.preskip_quantize!r} is not possible: choose {', '.join(QUANTIZED)} or None"
            )
        if layers is not None and not (len(set(layers)) == len(layers) and set(layers) <= set(range(count))):
            raise PreskipError(
                f"preskip_layers={layers} is not possible with {count} layers: give each at most once, 0 to {count - 1}"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'; the dict of a base config (`preskip_init_weights` not given) means a retrofit: identity."""
        if config_dict.get("model_type") != cls.model_type:  # type: ignore[attr-defined]
            kept = {key: value for key, value in config_dict.items() if key not in ("model_type", "architectures")}
            config_dict = {"preskip_init_weights": "identity", **kept}
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing: what loads the classes without an import of preskip is the stub alone."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers'; with the stub, where `auto_map` names it (a model's `save_pretrained` calls this)."""
        text = stub_text(getattr(self, "auto_map", None) or {})
        if text:
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / STUB).write_text(text, encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


def with_branch(
    kind: type[PreTrainedConfig], base: PreTrainedConfig, settings: BranchSettings, **more: Any
) -> PreTrainedConfig:
    """The config of a base model with branches.

    Args:
        kind: the class, of `config_class`.
        base: the base's config.
        settings: of the branches.
        more: further fields, e.g. preskip_layers.

    Raises:
        PreskipError: settings that do not fit the base.
    """
    values = base.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version"):
        values.pop(key, None)
    return kind(**values, **branch_fields(settings), **more)


def branch_fields(settings: BranchSettings) -> dict[str, Any]:
    """The settings of a branch as fields of a config."""
    return {PREFIX + field.name: getattr(settings, field.name) for field in fields(BranchSettings)}


def config_class(base_type: str) -> type[PreTrainedConfig]:
    """Build the config class of `preskip_<base_type>`, e.g. `PreskipLlamaConfig`: its own fields and the branch's."""
    base = CONFIG_MAPPING[base_type]
    return type(
        f"Preskip{base.__name__}",
        (BranchConfigMixin, base),
        {
            "__annotations__": {name: kind for name, (kind, _) in _FIELDS.items()},
            **{name: default for name, (_, default) in _FIELDS.items()},
            "model_type": f"{PREFIX}{base_type}",
            "__module__": "preskip.architecture.models",
            "__doc__": f"{base.__name__} with the branch's fields (`preskip.BranchSettings`), `preskip_` before "
            "each, `preskip_skip_position`, `preskip_layers` (None for all), `preskip_keep_float32` (True: its "
            "weights are float32 whatever dtype the rest is loaded in), `preskip_adapters` (settings by name, of "
            "several adapters side by side), `preskip_first_adapter` (which one rows have that pick none), "
            "`preskip_quantize` (int8: as `bake` has stored them), `preskip_peers` (settings by name, of other "
            "changes of the block: `preskip.peers`).",
        },
    )
