"""A frozen base quantised by bitsandbytes (nf4 and int8, on the CPU): identity, training, saving, stacking; buffers."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import zoo
from commands import PROBE, preskip
from preskip import PreskipConfig, PreskipError, bake
from preskip.adapter import PreskipLayer
from preskip.assets import load_tokenizer, weights_dtype
from tiny_model import save_tiny_llama, write_corpus

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS = {
    "nf4": {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32,
    },
    "int8": {"load_in_8bit": True},
}  # fmt: skip


@pytest.fixture(params=SETTINGS)
def quantized(request, tmp_path):
    """A function that gives the same quantised model at each call."""
    zoo.build("llama", hidden_size=64, head_dim=16).save_pretrained(tmp_path / "base")

    def build():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base",
            dtype=torch.float32,
            device_map="cpu",
            quantization_config=BitsAndBytesConfig(**SETTINGS[request.param]),
        ).eval()

    try:
        zoo.logits(build(), "llama")
    except (RuntimeError, NotImplementedError, ImportError, AttributeError) as error:
        pytest.skip(f"bitsandbytes {request.param} does not run on this processor: {error}")
    build.kind = request.param
    return build


def test_a_quantised_base_is_adapted_trained_saved_and_loaded(quantized, tmp_path) -> None:
    base = quantized()
    assert type(base.model.layers[0].self_attn.q_proj).__name__ in ("Linear4bit", "Linear8bitLt")
    untouched = zoo.logits(base, "llama")
    model = get_peft_model(base, PreskipConfig()).eval()
    assert torch.equal(zoo.logits(model, "llama"), untouched)
    weights = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert len(weights) == 6
    assert {p.dtype for p in weights.values()} == {torch.float32}
    assert {m.width for m in model.modules() if isinstance(m, PreskipLayer)} == {64}

    zoo.randomise(model)
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    batch, losses = zoo.inputs("llama"), []
    for _ in range(4):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1

    changed = zoo.logits(model, "llama")
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(quantized(), tmp_path / "adapter").eval()
    assert torch.equal(zoo.logits(loaded, "llama"), changed)
    with model.disable_adapter():
        assert torch.equal(zoo.logits(model, "llama"), untouched)
    assert torch.equal(zoo.logits(model.unload(), "llama"), untouched)


def test_qlora_and_a_branch_on_one_quantised_base(quantized) -> None:
    model = get_peft_model(quantized(), PreskipConfig(), adapter_name="branch").eval()
    zoo.randomise(model)
    alone = zoo.logits(model, "llama")
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    both = get_peft_model(model.get_base_model(), lora, adapter_name="lora").eval()
    assert torch.equal(zoo.logits(both, "llama"), alone)
    zoo.randomise(both, seed=5)
    assert zoo.difference(zoo.logits(both, "llama"), alone) > 1e-3


def test_a_base_saved_quantised_is_loaded_and_adapted_as_such(quantized, tmp_path) -> None:
    quantized().save_pretrained(tmp_path / "saved")
    build = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()  # noqa: E731
    base = build()
    assert base.is_quantized
    assert type(base.model.layers[0].self_attn.q_proj).__name__ in ("Linear4bit", "Linear8bitLt")
    untouched = zoo.logits(base, "llama")
    assert zoo.difference(untouched, zoo.logits(quantized(), "llama")) <= 1e-5
    model = get_peft_model(base, PreskipConfig()).eval()
    assert torch.equal(zoo.logits(model, "llama"), untouched)
    assert {m.width for m in model.modules() if isinstance(m, PreskipLayer)} == {64}
    zoo.randomise(model)
    wanted = zoo.logits(model, "llama")
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter").eval()
    assert torch.equal(zoo.logits(loaded, "llama"), wanted)
    with pytest.raises(PreskipError, match="a quantised base cannot be baked"):
        bake(model, tmp_path / "baked")


def test_facts_are_those_of_what_was_loaded(quantized) -> None:
    base = quantized()
    plain = zoo.build("llama", hidden_size=64, head_dim=16)
    assert weights_dtype(base) == f"float32, matrices {quantized.kind} (bitsandbytes)"
    assert weights_dtype(plain) == "float32"
    assert base.num_parameters() == sum(parameter.numel() for parameter in plain.parameters())


def test_a_probe_and_explain_record_a_quantised_base_as_loaded(quantized, tmp_path, capsys) -> None:
    folder, kind = tmp_path / "saved", f"float32, matrices {quantized.kind} (bitsandbytes)"
    plain = save_tiny_llama(tmp_path / "plain", hidden_size=64)
    quantise = BitsAndBytesConfig(**SETTINGS[quantized.kind])
    AutoModelForCausalLM.from_pretrained(plain, device_map="cpu", quantization_config=quantise).save_pretrained(folder)
    load_tokenizer(str(plain)).save_pretrained(folder)
    corpus, run = write_corpus(tmp_path / "corpus.jsonl"), tmp_path / "run"
    arguments = [*PROBE, "--corpus", corpus, "--arms", "none,preskip", "--out", run]
    assert preskip("probe", folder, *arguments) == 0
    assert f"base weights as loaded: {kind}" in capsys.readouterr().err
    manifest = json.loads((run / "run.json").read_text())
    assert {facts["base_dtype"] for facts in manifest["arms"].values()} == {manifest["model"]["dtype"]} == {kind}
    card = (run / "arms/preskip/seed-42/adapter/README.md").read_text()
    assert "dtype=torch.float32)" in card
    assert f"Base weights {kind} and frozen" in card.replace("\\", "")
    assert (
        preskip("explain", run, "--documents", 2, "--words", 5, "--out", tmp_path / "explained", "--dtype", "float32")
        == 0
    )
    assert f"base weights {kind} (as asked), cpu" in capsys.readouterr().err.replace("\n", " ")


class Packed(nn.Module):
    """As GPTQ's linear layers: the weights are buffers of integers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scales", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("qweight", (linear.weight.detach() / self.scales).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight.to(x.dtype) * self.scales).T


def test_a_base_whose_packed_weights_are_buffers_is_adapted_and_trained() -> None:
    base = zoo.build("llama")
    for layer in base.model.layers:
        for name, linear in list(layer.self_attn.named_children()):
            setattr(layer.self_attn, name, Packed(linear))
    untouched = zoo.logits(base, "llama")
    model = get_peft_model(base, PreskipConfig())
    assert torch.equal(zoo.logits(model, "llama"), untouched)
    batch = zoo.inputs("llama")
    model(**batch, labels=batch["input_ids"]).loss.backward()
    moved = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(moved) == 2 * zoo.LAYERS  # down and skip; up follows once down is not zero
