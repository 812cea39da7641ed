"""Several adapters where all requests lie in one row: each token has its adapter's branch, told by a layer's LoRA."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import zoo
from preskip import PreskipConfig, PreskipError, bake
from preskip.architecture.config import adapter_settings
from preskip.serve.branches import check_hooks, put_back
from preskip.serve.by_token import PICK, engine_options, server_arguments, write_loras
from preskip.serve.checkpoint import examine

SETTINGS = {"zeal": {}, "ash": {"gated": True, "expansion": 0.5}, "moss": {"enrich_attention": False}}
ORDER = list(SETTINGS)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def place(request, tmp_path_factory):
    """Three adapters of different make, baked together; in Gemma 2 behind the norm."""
    more = {"skip_position": "residual"} if request.param == "gemma2" else {}
    model = get_peft_model(zoo.build(request.param), PreskipConfig(**more), adapter_name="zeal")
    for name in ORDER[1:]:
        model.add_adapter(name, PreskipConfig(**SETTINGS[name], **more))
    for seed, name in enumerate(ORDER):
        model.set_adapter(name)
        zoo.randomise(model, seed=seed)
    return bake(model, tmp_path_factory.mktemp(request.param) / "baked", adapter=ORDER), request.param


class Layer(nn.Module):
    """A layer 1 → 1 with weight 0 and LoRAs, as vLLM computes it on a CPU: slots, and -1 for a request without one."""

    def __init__(self, path, loras, slots, requests):
        super().__init__()
        products = [tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"] for tensors in loras]
        self.slots = torch.stack([*products, *[torch.zeros(1, 1)] * (slots - len(products))])
        self.requests = requests

    def forward(self, x):
        return torch.einsum("rti,roi->rto", x, self.slots[self.requests])


@torch.no_grad()
def test_each_request_is_as_with_its_adapter_alone(place, tmp_path):
    folder, family = place
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    values = zoo.inputs(family, batch=4)
    rows = ["moss", "__base__", "zeal", "ash"]
    expected = model(**values, adapter_names=rows).logits
    alone = model(**values, adapter_names=["zeal"]).logits
    given = write_loras(ORDER, examine(folder).branches, tmp_path)
    assert [one["name"] for one in given] == ORDER
    loras = [load_file(f"{one['path']}/adapter_model.safetensors") for one in given]
    slots = engine_options(len(ORDER))["max_loras"]
    requests = [-1 if name == "__base__" else ORDER.index(name) for name in rows]
    put_back(model, model.config, pick=lambda path: Layer(f"base_model.model.{path}.{PICK}", loras, slots, requests))
    assert check_hooks(model, model.config) == 2
    found = model(**values).logits
    assert zoo.difference(found, expected) < 1e-5
    assert zoo.difference(found[2], alone[2]) < 1e-5
    assert zoo.difference(found[0], alone[0]) > 0.1
    for module in model.modules():
        if isinstance(module, Layer):
            module.requests = [-1] * 4
    assert zoo.difference(model(**values).logits, zoo.logits(zoo.build(family), family, batch=4)) < 1e-5


def test_the_loras_name_every_branch_and_are_what_vllm_reads(place, tmp_path):
    folder, _ = place
    branches = examine(folder).branches
    assert branches == tuple(f"model.layers.{layer}.self_attn.preskip" for layer in (0, 1))
    loras = write_loras(ORDER, branches, tmp_path)
    arguments = server_arguments(loras)
    assert arguments[:8] == [
        "--enable-lora", "--max-loras", "4", "--max-lora-rank", "1", "--lora-target-modules", PICK, "--enforce-eager",
    ]  # fmt: skip
    assert arguments[8:11] == ["--served-model-name", "__base__", "--lora-modules"]
    assert [json.loads(text) for text in arguments[11:]] == loras
    config = json.loads((tmp_path / "2" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (1, 1, [PICK])
    assert len(load_file(tmp_path / "2" / "adapter_model.safetensors")) == 2 * len(branches)
    with pytest.raises(PreskipError, match="257 adapters are too many"):
        write_loras([str(number) for number in range(257)], branches, tmp_path)


def test_the_first_adapter_is_the_first_that_was_given_after_loading_too(place):
    folder, family = place
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert list(adapter_settings(model.config)) == ["zeal", "ash", "moss"]
    values = zoo.inputs(family)
    with torch.no_grad():
        assert torch.equal(model(**values).logits, model(**values, adapter_names=["zeal"]).logits)
