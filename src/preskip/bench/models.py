"""The base and its rows: every row is a model of its own, on the base's own tensors where it does not change them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from preskip.arms import ARMS, ArmContext, attention_paths, branch_parameters
from preskip.attach import CHILD
from preskip.baking import bake
from preskip.bench.counts import free_memory
from preskip.bench.settings import CHEAP
from preskip.branch_settings import BranchSettings
from preskip.errors import PreskipError, explained, one_line
from preskip.optimizing import optimize

# Of the base: itself, the float32 reference, and what is being computed, saved or loaded; in bases.
_COPIES = 4.0
# A row's own weights per weight of a full branch: 8 of a lone optimised one (float32, a copy as it computes, a packed
# one), but most rows share these, and the base has none.
_BYTES_PER_WEIGHT = 3
_SHARE_OF_MEMORY = 0.8


@dataclass(kw_only=True)
class Row:
    """One way to run the model.

    Attributes:
        name: of `preskip.bench.settings.ROWS`.
        model: eager.
        forward: what is called; the model, or its compiled form.
        kind: rows of one kind compute the same function.
        held_against: the row that its time is divided by.
        facts: load time and file size.
    """

    name: str
    model: Any
    forward: Callable[..., Any]
    kind: str
    held_against: str
    facts: dict[str, Any] = field(default_factory=dict)


def random_base(config: Any, dtype: torch.dtype, device: torch.device, rows: int) -> Any:
    """A random model of a config, with as many of its layers as fit beside the rows made of it.

    Args:
        config: of a causal language model.
        dtype: of its weights.
        device: where to make it.
        rows: how many there will be.

    Returns:
        The model in evaluation mode.

    Raises:
        PreskipError: not one layer fits.
    """
    from transformers import AutoModelForCausalLM

    asked = config.num_hidden_layers
    with torch.device("meta"):
        one, two = (_bytes(AutoModelForCausalLM.from_config(_with_layers(config, n), dtype=dtype)) for n in (1, 2))
    layer = two - one
    branch = BranchSettings().cost(config.get_text_config().hidden_size).parameters
    more = layer + rows * _BYTES_PER_WEIGHT * branch  # merged LoRA has layers of its own
    first, room = _COPIES * one + more, _SHARE_OF_MEMORY * free_memory(device)
    layers = min(asked, 1 + math.floor((room - first) / (_COPIES * layer + more)))
    if layers < 1:
        raise PreskipError(
            f"one layer of this shape takes {first / 2**30:.1f} GiB with its {rows} rows, and {room / 2**30:.1f} GiB "
            "may be used: compare fewer --rows, or free memory"
        )
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(_with_layers(config, layers), dtype=dtype).eval()


def _with_layers(config: Any, layers: int) -> Any:
    own = copy.deepcopy(config)
    own.num_hidden_layers = layers
    if getattr(own, "layer_types", None):
        own.layer_types = own.layer_types[:layers]
    return own


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _attentions(base: Any) -> list[str]:
    """Paths of the attentions, of which every layer has one: so attention and its cache are counted.

    Raises:
        PreskipError: there are layers without.
    """
    try:
        return attention_paths(base)
    except PreskipError as error:
        raise PreskipError(
            f"{type(base).__name__} has layers without a known self-attention: bench counts attention and a K/V cache "
            "in every layer, so give it another model; where some layers have attention, "
            "`preskip probe MODEL --layers attention` adapts and times those"
        ) from error


def sharing(model: Any, own: Iterable[str] = (), *, float32: bool = False) -> Any:
    """A copy of a model on the same tensors, but for the weights of the modules named in `own`.

    With `float32` what has another dtype is converted, without a copy in its own dtype in between.
    """
    apart = {id(p) for name in own for p in model.get_submodule(name).parameters()}
    memo: dict[int, Any] = {id(p): p for p in model.parameters() if id(p) not in apart}
    if float32:
        memo = {key: nn.Parameter(p.float(), requires_grad=p.requires_grad) if p.dtype != torch.float32 else p
                for key, p in memo.items()}  # fmt: skip
        return copy.deepcopy(model, memo).float()
    return copy.deepcopy(model, memo)


class Rows:
    """Makes the rows of one base.

    Args:
        base: a causal language model; it is not changed.
        dtype: of its weights.
        adapter: folder of a trained Preskip adapter, or None for random branches of the paper's shape.
        workspace: an empty folder.
        trust_remote_code: run the code of the base's repository as its files are loaded.
    """

    def __init__(
        self, base: Any, dtype: torch.dtype, adapter: Path | None, workspace: Path, trust_remote_code: bool = False
    ) -> None:
        self.base, self.dtype, self.folder, self.workspace = base, dtype, adapter, workspace
        self.device, self.trust_remote_code = next(base.parameters()).device, trust_remote_code
        self.targets = _attentions(base)
        self.made: dict[str, Any] = {}
        if adapter is None:
            self.budget = branch_parameters(base, BranchSettings(), self.targets)
        else:
            model = self._model("adapter")
            weights = [p for name, p in model.named_parameters() if f".{CHILD}." in name]
            if not weights:
                raise PreskipError(f"adapter {adapter} has no Preskip branch: bench makes LoRA itself")
            self.budget = sum(p.numel() for p in weights)

    def make(self, name: str) -> Row:
        """One row."""
        eager = name.removesuffix("-compiled")
        compiled = eager != name
        model = self._model(eager)
        if (compiled and eager != "base") or eager not in ("base", "adapter", "baked", "lora", "lora-merged"):
            model = sharing(model)
            optimize(model)
        return Row(
            name=name,
            model=model,
            forward=compile_model(model, self.device) if compiled else model,
            kind={"lora-merged": "lora", "optimized": "adapter", "baked": "adapter", "int8": "adapter"}.get(
                eager, eager
            ),
            held_against="base-compiled" if compiled else "base",
            facts=self._facts(eager),
        )

    def reference(self, kind: str) -> Any:
        """The model of a kind in float32, with attention written out: what the logits of its rows are held against."""
        model = sharing(self._model(kind), float32=True)
        (model.get_base_model() if hasattr(model, "get_base_model") else model).set_attn_implementation("eager")
        return model.eval()

    def _model(self, name: str) -> Any:
        if name == "optimized":
            name = "adapter"
        if name not in self.made:
            make = {"base": lambda: self.base, "adapter": self._adapter, "baked": self._baked, "lora": self._lora,
                    "lora-merged": self._merged, "int8": self._int8}  # fmt: skip
            self.made[name] = (self._branches(CHEAP[name]) if name in CHEAP else make[name]()).eval()
        return self.made[name]

    def _adapter(self) -> Any:
        if self.folder is None:
            return self._branches("preskip")
        from preskip.evaluate.adapters import load_adapter

        model = load_adapter(sharing(self.base), self.folder)
        for name, parameter in model.named_parameters():  # it is loaded frozen, and would be counted so in training
            parameter.requires_grad_(f".{CHILD}." in name)
        return model

    def _branches(self, arm: str) -> Any:
        """The base with an arm's branches, filled so that they change its logits."""
        from peft import get_peft_model

        (config,) = ARMS[arm].configs(self._context())
        return _filled(get_peft_model(sharing(self.base), config), f".{CHILD}.")

    def _baked(self) -> Any:
        return self._from_file("baked")

    def _int8(self) -> Any:
        return self._from_file("int8", quantize="int8")

    def _from_file(self, name: str, **options: Any) -> Any:
        """Baked, loaded again, and put on the base's own tensors where they are the same, as they are by definition."""
        out = self.workspace / name
        bake(self._model("adapter"), out, **options)
        model = self._load(out)
        ours = dict(self.base.named_parameters(remove_duplicate=False))
        for key, parameter in list(model.named_parameters(remove_duplicate=False)):
            path, _, leaf = key.rpartition(".")
            if key in ours and torch.equal(parameter, ours[key]):
                model.get_submodule(path)._parameters[leaf] = ours[key]
        model.set_attn_implementation(self.base.config._attn_implementation)
        return model

    def _context(self) -> ArmContext:
        return ArmContext(
            base=self.base,
            settings=BranchSettings(),
            skip_position="attention",
            layers=None,
            targets=tuple(self.targets),
            budget=self.budget,
        )

    def _lora(self) -> Any:
        (config,) = ARMS["lora"].configs(self._context())
        return _filled(_with_lora(sharing(self.base), config), ".lora_B.")

    def _merged(self) -> Any:
        config: Any = ARMS["lora"].configs(self._context())[0]
        model = _with_lora(sharing(self.base, own=config.target_modules), config)
        state = {name: p for name, p in self._model("lora").named_parameters() if ".lora_" in name}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in state:
                    parameter.copy_(state[name])
        return model.merge_and_unload()

    def _load(self, folder: Path) -> Any:
        from transformers import AutoModelForCausalLM

        options: Any = {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code}
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
        return model.to(self.device).eval()

    def _facts(self, name: str) -> dict[str, Any]:
        """Seconds to load the row from files (read before, so from the system's cache), and the bytes of these."""
        from peft import PeftModel

        base = self.workspace / "base"
        if not base.exists():
            self.base.save_pretrained(base)
        folder = self.workspace / name
        if name in ("base", "baked", "int8"):
            started = time.perf_counter()
            self._load(folder)
            return {"load_seconds": time.perf_counter() - started, "file_bytes": _file_bytes(folder)}
        if name == "lora-merged":
            return {}
        model = self._model(name)
        if not folder.exists():
            model.save_pretrained(folder)
        started = time.perf_counter()
        PeftModel.from_pretrained(self._load(base), str(folder))
        return {
            "load_seconds": time.perf_counter() - started,
            "file_bytes": _file_bytes(base) + _file_bytes(folder),
        }


def compile_model(model: Any, device: torch.device, backend: str = "inductor") -> Any:
    """One graph per shape, with CUDA graphs on CUDA."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    mode = "reduce-overhead" if device.type == "cuda" and backend == "inductor" else None
    return torch.compile(inner, backend=backend, mode=mode, fullgraph=True, dynamic=False)


def _with_lora(model: Any, config: Any) -> Any:
    """The model with LoRA; PEFT refuses layers of Mamba."""
    from peft import get_peft_model

    with explained(lambda error: f"PEFT puts no LoRA into this model: {one_line(error, 200)}"):
        return get_peft_model(model, config)


def _filled(model: Any, part: str) -> Any:
    """Random weights in place of an initialisation that changes nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                std = 0.2 / math.sqrt(parameter.shape[1])
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def _file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
