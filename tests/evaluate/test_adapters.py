"""Adapters of any PEFT type load whole or not at all."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

import zoo
from preskip import PreskipConfig
from preskip.errors import PreskipError
from preskip.evaluate.adapters import load_adapter
from preskip.runs.weights import adapter_folders
from tiny_model import tiny_llama

CONFIGS = {
    "preskip": PreskipConfig(init_weights="paper", init_std=0.3, skip_init_std=0.3),
    "lora": LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "ia3": IA3Config(init_ia3_weights=False, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
IDS = torch.arange(5, 21)[None]


def save(name, folder):
    model = get_peft_model(tiny_llama(), CONFIGS[name]).eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_adapter_gives_the_same_logits(name, tmp_path):
    logits = save(name, tmp_path)
    model = load_adapter(tiny_llama(), tmp_path)
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, logits)
        assert not torch.equal(tiny_llama()(input_ids=IDS).logits, logits[:, -16:])


@pytest.mark.parametrize("name", ["preskip", "lora", "ia3"])
def test_missing_and_surplus_tensors_are_refused(name, tmp_path):
    save(name, tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = min(tensors)
    save_file({other: tensor for other, tensor in tensors.items() if other != key}, weights)
    with pytest.raises(PreskipError, match="lacks"):
        load_adapter(tiny_llama(), tmp_path)
    save_file(tensors, weights)
    with pytest.raises(PreskipError, match=r"without a place|no place for"):
        load_adapter(tiny_llama(num_hidden_layers=1), tmp_path)
    with pytest.raises(PreskipError):
        load_adapter(tiny_llama(hidden_size=16), tmp_path)


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(PreskipError, match=r"no adapter_config\.json"):
        load_adapter(tiny_llama(), tmp_path)
    save("lora", tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(PreskipError, match="does not fit this model"):
        load_adapter(tiny_llama(), tmp_path)
    weights.unlink()
    with pytest.raises(PreskipError, match=r"no adapter_model.safetensors"):
        load_adapter(tiny_llama(), tmp_path)


@pytest.mark.filterwarnings("error::UserWarning")
def test_stacked_adapters_are_all_on(tmp_path):
    """Each in a folder of its own; the logits are those of both put on one after the other."""
    base = tiny_llama()
    for number, name in enumerate(("preskip", "lora"), 1):
        single = get_peft_model(tiny_llama(), CONFIGS[name])
        zoo.randomise(single, seed=number)
        single.save_pretrained(tmp_path / str(number))
        alone = load_adapter(tiny_llama(), tmp_path / str(number))
        with torch.no_grad():
            assert torch.equal(alone(input_ids=IDS).logits, single.eval()(input_ids=IDS).logits)
    PeftModel.from_pretrained(base, str(tmp_path / "1"))
    with pytest.warns(UserWarning, match="Already found"):
        wanted = PeftModel.from_pretrained(base, str(tmp_path / "2")).eval()
    model = load_adapter(tiny_llama(), tmp_path)
    assert not model.training
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        assert torch.equal(logits, wanted(input_ids=IDS).logits)
        for part in ("1", "2"):
            one = load_adapter(tiny_llama(), tmp_path / part)(input_ids=IDS).logits
            assert zoo.difference(logits, one) > 1e-3


def test_stacked_adapters_load_whole_or_not_at_all(tmp_path):
    for number, name in enumerate(("preskip", "lora"), 1):
        save(name, tmp_path / str(number))
    assert adapter_folders(tmp_path) == [tmp_path / "1", tmp_path / "2"]
    assert adapter_folders(tmp_path / "2") == [tmp_path / "2"]
    for part in ("1", "2"):
        weights = tmp_path / part / "adapter_model.safetensors"
        tensors = load_file(weights)
        save_file({key: tensor for key, tensor in tensors.items() if key != min(tensors)}, weights)
        with pytest.raises(PreskipError, match="lacks"):
            load_adapter(tiny_llama(), tmp_path)
        save_file(tensors, weights)
    (tmp_path / "2").rename(tmp_path / "3")
    with pytest.raises(PreskipError, match="holds stacked adapters, but number 2 is missing"):
        load_adapter(tiny_llama(), tmp_path)
    (tmp_path / "3").rename(tmp_path / "other")
    with pytest.raises(PreskipError, match="number 2 is missing"):
        adapter_folders(tmp_path)
    (tmp_path / "1").rename(tmp_path / "more")
    assert adapter_folders(tmp_path) == []
