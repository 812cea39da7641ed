"""Base + trained adapter → one self-contained checkpoint of type `preskip_<type>`.

A branch depends non-linearly on its input and cannot be merged into the base's weights, so the checkpoint keeps it as
it is: the same tensors under the same names, without the adapter's. Logits do not change by a bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from preskip.adapter import base_model
from preskip.architecture.config import branch_settings, with_branch
from preskip.architecture.models import Architecture, architecture
from preskip.attach import CHILD
from preskip.branch_settings import BranchSettings
from preskip.errors import PreskipError
from preskip.model_types import TYPES
from preskip.quantizing import QUANTIZED
from preskip.quantizing import quantize as quantize_weight
from preskip.runs.files import clear_disk_errors, new_folder
from preskip.sites import find_sites
from preskip.version import __version__


def bake(
    model: nn.Module,
    out: Path | str,
    *,
    adapter: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    base_name: str | None = None,
    keep_float32: bool = False,
    quantize: str | None = None,
) -> Path:
    """Save a base model and its Preskip adapter as one checkpoint that `AutoModelForCausalLM.from_pretrained` loads.

    Where `preskip` is not imported, the checkpoint's own stub imports it (`trust_remote_code=True`).

    Args:
        model: a PEFT model with a Preskip adapter, or a model with one injected. It is not changed.
        out: the folder to make; must not exist.
        adapter: which adapter; None is the active one. Several names: their branches lie side by side, and calls and
            `generate` of the baked model take `adapter_names`, one per row; without, all rows have the first one's.
        tokenizer: saved beside the model, if given.
        base_name: what the model card calls the base; None takes the adapter's record.
        keep_float32: store the branch in float32 beside a bfloat16 base, and load it so, for further training. By
            default it has the base's dtype, in which it computes either way: the logits are the same.
        quantize: "int8" stores the branch's weights in int8, for inference: half of bfloat16's bytes, and logits that
            differ by what rounding the weights does.

    Returns:
        The folder.

    Raises:
        PreskipError: `out` exists, the model has no such adapter, its type has no architecture, it is quantised, its
            branches do not sit at the decoder's self-attentions, or another adapter is still on it. Nothing is left
            at `out`.
    """
    out = Path(out)
    if out.exists():
        raise PreskipError(f"{out} exists already: choose another folder")
    if quantize not in (None, *QUANTIZED):
        raise PreskipError(f"quantize={quantize!r} is not possible: choose {', '.join(QUANTIZED)} or None")
    if quantize and keep_float32:
        raise PreskipError("give either keep_float32 or quantize: int8 weights cannot be trained further")
    base = base_model(model)
    names = [adapter] if adapter is None or isinstance(adapter, str) else list(dict.fromkeys(adapter))
    if not names:
        raise PreskipError(f"adapter={adapter!r} names none: give a name, several, or None for the active one")
    found = [_find(model, base, name) for name in names]
    family = architecture(base.config.model_type) if base.config.model_type in TYPES else None
    if family is None:
        raise PreskipError(
            f"a {base.config.model_type} model cannot be baked: there is an architecture for {', '.join(TYPES)}"
        )
    if type(base).__name__ != family.causal_lm.__bases__[-1].__name__:
        raise PreskipError(f"{type(base).__name__} cannot be baked: only its causal language model can")
    baked = _rebuild(base, found, family, keep_float32, quantize)
    recorded = getattr(model, "peft_config", {}).get(found[0].name)
    source = base_name or getattr(recorded, "base_model_name_or_path", None) or base.config.name_or_path
    baked.config.auto_map = family.auto_map
    with clear_disk_errors(out), new_folder(out) as workspace:
        _save(baked, workspace)
        if tokenizer is not None:
            tokenizer.save_pretrained(workspace)
        (workspace / "README.md").write_text(short_card(baked, source), encoding="utf-8")
    return out


@dataclass(frozen=True, kw_only=True)
class _Adapter:
    """One adapter as its layers tell it: PEFT forgets configs when adapters are stacked."""

    name: str
    settings: BranchSettings
    skip_position: str
    modules: frozenset[str]


def _find(model: nn.Module, base: nn.Module, adapter: str | None) -> _Adapter:
    """An adapter on a model's base, after what can be known before building anything."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    from preskip.adapter import PreskipLayer

    layers = {name: module for name, module in base.named_modules() if isinstance(module, PreskipLayer)}
    names = sorted({name for layer in layers.values() for name in layer.settings})
    if not names:
        raise PreskipError(f"{type(model).__name__} has no Preskip adapter to bake")
    active = sorted({name for layer in layers.values() for name in layer.active_adapters if name in layer.settings})
    if adapter is None and len(active) != 1:
        raise PreskipError(f"{len(active)} adapters are active ({', '.join(active) or 'none'}): name one of {names}")
    name = active[0] if adapter is None else adapter
    if name not in names:
        raise PreskipError(f"there is no Preskip adapter {name!r} on this model: choose one of {names}")
    others = [m for m in base.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, PreskipLayer)]
    if others:
        raise PreskipError(
            f"{len(others)} layers carry another adapter ({type(others[0]).__name__}): merge or unload it first"
        )
    if getattr(base, "is_quantized", False) or getattr(base, "quantization_method", None) is not None:
        raise PreskipError("a quantised base cannot be baked: load it in full precision and put the adapter on that")
    if any(tensor.is_meta for tensor in base.state_dict().values()):
        raise PreskipError(
            "parts of the base are offloaded and not in memory: load it whole (without device_map) to bake it"
        )
    own = {path: layer for path, layer in layers.items() if name in layer.settings}
    first = next(iter(own.values()))
    return _Adapter(
        name=name,
        settings=first.settings[name],
        skip_position="attention" if first.tap is None else "residual",
        modules=frozenset(path.removesuffix(f".{CHILD}") for path in own),
    )


def _rebuild(
    base: Any, adapters: Sequence[_Adapter], family: Architecture, keep_float32: bool, quantize: str | None = None
) -> Any:
    """The model with branches, on the base's own tensors."""
    adapter = adapters[0]
    for other in adapters[1:]:
        if (other.skip_position, other.modules) != (adapter.skip_position, adapter.modules):
            raise PreskipError(
                f"adapters {adapter.name!r} and {other.name!r} do not sit at the same layers and position: bake them "
                "one by one"
            )
    if adapters[1:] and any(".modules_to_save." in key for key, _ in base.named_parameters()):
        raise PreskipError("adapters with modules_to_save cannot lie side by side: bake them one by one")
    sites = {site.name: site.layer for site in find_sites(base).attentions}
    strays = sorted(adapter.modules - sites.keys())
    if strays:
        raise PreskipError(f"the branch at {strays[0]} is not at a self-attention of the decoder: it cannot be baked")
    layers = sorted(sites[name] for name in adapter.modules)
    config: Any = with_branch(
        family.config,
        base.config,
        adapter.settings,
        preskip_skip_position=adapter.skip_position,
        preskip_layers=None if len(layers) == len(sites) else layers,
        preskip_keep_float32=keep_float32,
        preskip_adapters={own.name: asdict(own.settings) for own in adapters} if adapters[1:] else None,
        preskip_first_adapter=adapter.name if adapters[1:] else None,
        preskip_quantize=quantize,
        attn_implementation=base.config._attn_implementation,
    )
    config.dtype = base.dtype
    tensors: dict[str, torch.Tensor] = {}
    for own in adapters:
        tensors |= _plain_keys(base.state_dict(), own.name, f"{own.name}." if adapters[1:] else "")
    # An embedding that was trained apart from the output it was tied to is a tensor of its own from here on.
    tied = getattr(base, "_tied_weights_keys", None) or {}
    if any(tensors[one].data_ptr() != tensors[other].data_ptr() for one, other in tied.items() if one in tensors):
        config.tie_word_embeddings = False
    with torch.device("meta"):
        baked: Any = family.causal_lm(config)
    if quantize:
        # In float16 small scales would lose digits; such a model keeps its branch in float32 when it is loaded, too.
        tensors = dict(_quantized(tensors, base.dtype if base.dtype == torch.bfloat16 else torch.float32))
    elif base.dtype == torch.bfloat16 and not keep_float32:  # float16 branches compute in float32 (`preskip.casting`)
        tensors = {key: value.to(base.dtype) if f".{CHILD}." in key else value for key, value in tensors.items()}
    baked.load_state_dict(tensors, strict=True, assign=True)
    # Buffers that no state dict holds (rotary frequencies, Gemma's scale of embeddings) are the base's, too.
    buffers = _plain_keys(dict(base.named_buffers()), adapter.name)
    for name, buffer in list(baked.named_buffers()):
        if buffer.is_meta:
            path, _, leaf = name.rpartition(".")
            setattr(baked.get_submodule(path), leaf, buffers[name])
    baked.tie_weights()
    for name, tensor in baked.state_dict().items():
        if tensor.data_ptr() != tensors[name].data_ptr():
            raise PreskipError(f"{name} was trained apart from the tensor it is tied to: baked, it could not be kept")
    if base.can_generate():
        baked.generation_config = base.generation_config
    return baked.eval()


def _save(baked: Any, folder: Path) -> None:
    """`save_pretrained`, also where the base's generation config contradicts itself: it is kept as it is."""
    given = baked.generation_config if baked.can_generate() else None
    try:
        if given is not None:
            given.validate(strict=True)
    except ValueError as error:
        reason = next(line for line in str(error).splitlines()[1:] if line)
        warnings.warn(f"the base's generation config contradicts itself and is kept so: {reason}", stacklevel=3)
        baked.generation_config = GenerationConfig()
    baked.save_pretrained(folder)
    if given is not None and baked.generation_config is not given:
        given.to_json_file(folder / "generation_config.json")
        baked.generation_config = given


def _quantized(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The branch's matrices in int8, with their scales beside them; everything else as it is."""
    for key, value in tensors.items():
        if f".{CHILD}." in key:
            weight, scale = quantize_weight(value, dtype)
            yield key, weight
            yield f"{key.removesuffix('weight')}scale", scale
        else:
            yield key, value


def _plain_keys(state: dict[str, torch.Tensor], adapter: str, within: str = "") -> dict[str, torch.Tensor]:
    """A PEFT model's tensors under plain names: this adapter's branches and trained copies, no other adapter's.

    The branch's have `within` before the part's name.
    """
    plain: dict[str, torch.Tensor] = {}
    copies = f".modules_to_save.{adapter}."
    for key, tensor in state.items():
        if f".{CHILD}." in key:
            path, part, owner, leaf = key.rsplit(".", 3)
            if owner == adapter:
                plain[f"{path}.{within}{part}.{leaf}"] = tensor
        elif copies in key:
            plain[key.replace(copies, ".")] = tensor
        elif ".modules_to_save." not in key:
            plain.setdefault(key.replace(".original_module.", "."), tensor)
    return plain


def short_card(baked: Any, source: str | None) -> str:
    """README.md of a checkpoint of which no more is known than what it is made of."""
    from huggingface_hub import ModelCardData

    from preskip.model_card import LICENCE, REGISTERS, bullets, card_text, code_block, escape, loading

    is_hub_id = source and source.count("/") == 1 and not source.startswith((".", "/")) and not Path(source).exists()
    data = ModelCardData(
        base_model=source if is_hub_id else None, library_name="transformers", tags=["preskip", "text-generation"]
    )
    count = sum(t.numel() for name, t in baked.state_dict().items() if f".{CHILD}." in name and t.ndim == 2)
    settings = branch_settings(baked.config)
    named = ", ".join(f"{field.name} {getattr(settings, field.name)}" for field in fields(BranchSettings))
    layers, several = baked.config.preskip_layers, baked.config.preskip_adapters
    facts = [f"Branch: {named}", f"Layers: {'all' if layers is None else layers}"]
    if several:
        facts = [f"Adapters, for `adapter_names`: {escape(', '.join(several))}", facts[1]]
    if baked.config.preskip_quantize:
        facts.append(f"Branch weights: {baked.config.preskip_quantize}")
    return card_text(
        data,
        f"# {escape(source or baked.config.model_type)} with a pre-projection and a content skip",
        f"`{baked.config.model_type}`: {escape(source or 'a base model')} with the branches of a trained Preskip "
        f"adapter (arXiv 2604.10791) built in, {count:,} weights beside the base's. Baked with preskip {__version__}.",
        bullets(facts),
        code_block(loading(REGISTERS), "python"),
        LICENCE,
    )
