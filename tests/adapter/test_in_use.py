"""Adapters as people handle them: added tokens, folders, offloading, resuming, switching while compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from peft.utils import load_peft_weights
from peft.utils.hotswap import hotswap_adapter
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, ByT5Tokenizer, Trainer, TrainingArguments

import zoo
from preskip import PreskipConfig, PreskipError, bake, optimize
from preskip.evaluate.adapters import load_adapter, load_tokenizer_of
from tiny_text import tiny_tokenizer

IDS = torch.tensor([[5, 130, 9, 139, 20, 128]])
DEVICES = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.norm": "cpu", "lm_head": "cpu",
}  # fmt: skip


def adapted(name: str = "llama", **settings: Any) -> PeftModel:
    model = get_peft_model(zoo.build(name), PreskipConfig(**settings))
    zoo.randomise(model)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_added_tokens_are_trained_saved_loaded_on_the_plain_base_and_baked(family: str, tied: bool, tmp_path) -> None:
    base = zoo.build(family, tie_word_embeddings=tied)
    base.resize_token_embeddings(140, mean_resizing=False)
    parts = ["embed_tokens", "lm_head"]
    model = get_peft_model(base, PreskipConfig(modules_to_save=parts, init_weights="paper"))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    optimiser = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimiser.step()
    model.eval()
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert {name.split(".")[-4] for name in changed if "modules_to_save" in name} == set(parts)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    # As `preskip eval` and `preskip bake` load it: the base has 128 tokens, the adapter brings 140.
    loaded = load_adapter(zoo.build(family, tie_word_embeddings=tied), tmp_path / "adapter")
    assert zoo.difference(logits(loaded), wanted) == 0.0
    for number, one in enumerate((model, loaded)):
        bake(one, tmp_path / f"baked-{number}")
        baked = AutoModelForCausalLM.from_pretrained(tmp_path / f"baked-{number}").eval()
        assert (baked.config.vocab_size, baked.config.tie_word_embeddings) == (140, False)
        assert zoo.difference(logits(baked), wanted) == 0.0


def test_an_adapter_of_more_tokens_on_a_base_of_fewer_is_refused_with_the_call_that_mends_it(tmp_path) -> None:
    base = zoo.build("llama")
    base.resize_token_embeddings(140, mean_resizing=False)
    model = get_peft_model(base, PreskipConfig())
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(PreskipError, match=r"has shape \(140, 32\) .*: call resize_token_embeddings\(140\)") as caught:
        PeftModel.from_pretrained(zoo.build("llama"), tmp_path)
    assert "\n" not in str(caught.value)
    assert logits(load_adapter(zoo.build("llama"), tmp_path)).shape[-1] == 140


def test_the_tokenizer_beside_an_adapter_is_the_one_that_is_used(tmp_path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    larger = tiny_tokenizer()
    larger.add_tokens(["<ship>"])
    larger.save_pretrained(tmp_path / "adapter")
    (tmp_path / "bare").mkdir()
    base = str(tmp_path / "base")
    assert len(load_tokenizer_of(base, tmp_path / "adapter")) == len(larger) == len(load_tokenizer_of(base, None)) + 1
    assert len(load_tokenizer_of(base, tmp_path / "bare")) == len(larger) - 1
    in_python = ByT5Tokenizer()  # it saves no tokenizer.json
    in_python.add_tokens(["<ship>"])
    in_python.save_pretrained(tmp_path / "python")
    assert load_tokenizer_of(base, tmp_path / "python").encode("<ship>") == in_python.encode("<ship>")


def test_subfolders_and_names_with_dots_in_paths(tmp_path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path / "my.model-1.5" / "adapters" / "v0.1")
    loaded = PeftModel.from_pretrained(zoo.build("llama"), tmp_path / "my.model-1.5", subfolder="adapters/v0.1")
    assert zoo.difference(zoo.logits(loaded.eval(), "llama"), zoo.logits(model, "llama")) == 0.0


def test_a_base_that_is_partly_on_disk(tmp_path) -> None:
    zoo.build("llama").save_pretrained(tmp_path / "base")
    plain = zoo.logits(zoo.build("llama").requires_grad_(False), "llama")

    def offloaded() -> Any:
        folder = tmp_path / "offload"
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=DEVICES, offload_folder=folder)

    model = get_peft_model(offloaded(), PreskipConfig()).eval()
    assert {parameter.device.type for name, parameter in model.named_parameters() if ".preskip." in name} == {"cpu"}
    assert zoo.difference(zoo.logits(model, "llama"), plain) == 0.0
    zoo.randomise(model)
    wanted = zoo.logits(model, "llama")
    model.save_pretrained(tmp_path / "adapter")
    whole = PeftModel.from_pretrained(zoo.build("llama"), tmp_path / "adapter").eval()
    assert zoo.difference(zoo.logits(whole, "llama"), wanted) == 0.0
    # PeftModel.from_pretrained cannot dispatch such a base again, with LoRA neither.
    again = get_peft_model(offloaded(), PreskipConfig()).eval()
    set_peft_model_state_dict(again, load_peft_weights(str(tmp_path / "adapter")))
    assert zoo.difference(zoo.logits(again, "llama"), wanted) == 0.0
    with pytest.raises(PreskipError, match="offloaded and not in memory: load it whole"):
        bake(model, tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_that_is_offloaded_layer_by_layer(dtype: torch.dtype) -> None:
    """Each weight is on meta but for its own layer's forward; in bfloat16 that computes in float32."""
    model = get_peft_model(zoo.build("llama", dtype=dtype), PreskipConfig()).eval()
    zoo.randomise(model)
    wanted = zoo.logits(model, "llama")
    cpu_offload(model.get_base_model(), execution_device=torch.device("cpu"))
    assert {weight.device.type for name, weight in model.named_parameters() if ".preskip." in name} == {"meta"}
    tolerance = 2e-2 * wanted.abs().max() if dtype == torch.bfloat16 else 0.0
    assert zoo.difference(zoo.logits(model, "llama"), wanted) <= tolerance
    optimize(model)
    assert zoo.difference(zoo.logits(model, "llama"), wanted) <= tolerance


def test_an_untested_class_is_checked_on_a_base_that_is_on_disk(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("preskip.site_check.TESTED", set())
    zoo.build("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map={**DEVICES, "model.layers.0": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert len(get_peft_model(base, PreskipConfig()).peft_config["default"].target_modules) == 1


def two_adapters(active: str) -> PeftModel:
    torch.manual_seed(1)
    settings = PreskipConfig(init_weights="paper", init_std=0.1)
    model = get_peft_model(zoo.build("llama"), settings, adapter_name="one")
    model.add_adapter("two", settings)
    model.set_adapter(active)
    return model


def branches(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if ".preskip." in name}


def test_trainer_resumes_with_two_adapters_of_which_one_is_trained(tmp_path) -> None:
    rows = zoo.inputs("llama", batch=8)["input_ids"]

    def train(folder: Path, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        model = two_adapters("two")
        arguments = TrainingArguments(
            str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, seed=3,
            lr_scheduler_type="constant", report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        data: Any = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(model=model, args=arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        return branches(model)

    start, whole = branches(two_adapters("two")), train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2)
    resumed = train(tmp_path / "parts", 4, resume=True)
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name
        assert torch.equal(start[name], weight) == (".one." in name)


@contextmanager
def counted(model: PeftModel) -> Iterator[tuple[Any, CompileCounter]]:
    torch._dynamo.reset()
    counter = CompileCounter()
    yield torch.compile(model, backend=counter, fullgraph=True), counter
    torch._dynamo.reset()


@torch.no_grad()
def test_switching_compiles_once_per_adapter_and_weights_change_in_place_without_compiling(tmp_path) -> None:
    model = two_adapters("one").eval()
    with counted(model) as (compiled, counter):
        for name, frames in (("one", 1), ("two", 2), ("one", 2), ("two", 2)):
            model.set_adapter(name)
            assert zoo.difference(zoo.logits(compiled, "llama"), zoo.logits(model, "llama")) == 0.0
            assert counter.frame_count == frames
        model.save_pretrained(tmp_path)
        wanted = zoo.logits(model, "llama")
        # Hot-swapping: the weights of one adapter under the name of another.
        model.set_adapter("one")
        assert zoo.difference(zoo.logits(compiled, "llama"), wanted) > 1e-2
        weights = load_peft_weights(str(tmp_path / "two"))
        set_peft_model_state_dict(model, weights, "one")
        assert zoo.difference(zoo.logits(compiled, "llama"), wanted) == 0.0
        assert counter.frame_count == 2


def test_what_is_not_possible_is_said_in_one_line_with_what_is(tmp_path) -> None:
    model = two_adapters("one")
    with pytest.raises(PreskipError, match=r"add up, as after model.base_model.set_adapter\(\['a', 'b'\]\)"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both")
    model.save_pretrained(tmp_path)
    base = zoo.build("llama")
    base.load_adapter(str(tmp_path / "one"), adapter_name="mine")
    with pytest.raises(PreskipError, match=r"hot-swapped .*: load the other under its own name") as caught:
        base.load_adapter(str(tmp_path / "two"), adapter_name="mine", hotswap=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(model, str(tmp_path / "two"), "one")


@pytest.mark.parametrize(
    ("name", "other"), [("activation", "relu"), ("enrich_attention", False), ("skip_position", "residual")]
)
def test_a_name_that_is_taken_takes_weights_of_the_same_settings_alone(name: str, other: Any, tmp_path) -> None:
    adapted("gemma2").save_pretrained(tmp_path / "same")
    adapted("gemma2", **{name: other}).save_pretrained(tmp_path / "other")
    model = get_peft_model(zoo.build("gemma2"), PreskipConfig()).eval()
    before = zoo.logits(model, "gemma2")
    with pytest.raises(PreskipError, match=rf"has {name}=\S*, .*other was trained with .*: load it under") as caught:
        model.load_adapter(tmp_path / "other", "default")
    assert "\n" not in str(caught.value)
    assert torch.equal(zoo.logits(model, "gemma2"), before)
    model.load_adapter(tmp_path / "same", adapter_name="default")
    assert torch.equal(zoo.logits(model, "gemma2"), zoo.logits(adapted("gemma2"), "gemma2"))


def test_disabled_adapters_are_off_in_rows_that_name_them_too() -> None:
    model = two_adapters("one").eval()
    values = zoo.inputs("llama")
    with torch.no_grad(), model.disable_adapter():
        found = model(**values, adapter_names=["one", "two"]).logits
    assert torch.equal(found, zoo.logits(zoo.build("llama"), "llama"))


def test_pefts_switch_of_casts_leaves_the_branch_as_it_is() -> None:
    model = adapted()
    before = zoo.logits(model, "llama")
    with disable_input_dtype_casting(model):
        assert torch.equal(zoo.logits(model, "llama"), before)


@torch.no_grad()
def test_two_active_adapters_add_up_as_the_refusal_says() -> None:
    model = two_adapters("one").eval()
    model.base_model.set_adapter(["one", "two"])
    both = zoo.logits(model, "llama")
    for name, weight in model.named_parameters():
        if ".two." in name:
            weight.zero_()
    alone = zoo.logits(model, "llama")
    model.set_adapter("one")
    assert zoo.difference(alone, zoo.logits(model, "llama")) <= 1e-6
    assert zoo.difference(both, alone) > 1e-3


def test_a_generation_config_that_contradicts_itself_is_baked_as_it_is(tmp_path) -> None:
    model = adapted()
    given = model.get_base_model().generation_config
    given.do_sample, given.temperature = False, 0.5
    with pytest.warns(UserWarning, match="generation config contradicts itself and is kept so: .*temperature"):
        bake(model, tmp_path / "out")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (baked.generation_config.do_sample, baked.generation_config.temperature) == (False, 0.5)
    assert zoo.difference(zoo.logits(baked, "llama"), zoo.logits(model, "llama")) == 0.0
