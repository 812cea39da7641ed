"""A Preskip adapter's life in PEFT and in transformers' own adapter methods: add, switch, delete, heads, refusals."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

import preskip
import zoo
from preskip import PreskipConfig, PreskipError
from preskip.adapter import PreskipLayer, base_model

SETTINGS = {
    "gated": {"gated": True, "activation": "gelu"},
    "low_rank": {"skip_rank": 4, "expansion": 0.5},
    "content": {"enrich_attention": False},
    "skip_only": {"preprojection": False},
    "preprojection_only": {"content_skip": False, "dropout": 0.1},
    "residual": {"skip_position": "residual"},
}


def adapted(name: str = "llama", **settings):
    model = get_peft_model(zoo.build(name), PreskipConfig(**settings)).eval()
    zoo.randomise(model)
    return model


@pytest.mark.parametrize("case", SETTINGS)
def test_every_setting_survives_saving(case: str, tmp_path) -> None:
    model = adapted("gemma2", **SETTINGS[case])
    model.save_pretrained(tmp_path)
    stored = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(stored, PreskipConfig)
    assert {key: getattr(stored, key) for key in SETTINGS[case]} == SETTINGS[case]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PRESKIP"
    loaded = PeftModel.from_pretrained(zoo.build("gemma2"), tmp_path).eval()
    assert torch.equal(zoo.logits(loaded, "gemma2"), zoo.logits(model, "gemma2"))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft_loads_in_every_way(low_cpu_mem_usage: bool, tmp_path) -> None:
    zoo.build("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = get_peft_model(base, PreskipConfig(task_type="CAUSAL_LM")).eval()
    zoo.randomise(model)
    expected = zoo.logits(model, "llama")
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(zoo.logits(loaded, "llama"), expected)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert not any(p.requires_grad for p in loaded.parameters())
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter", is_trainable=True)
    assert sum(p.requires_grad for p in again.parameters()) == 6
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert torch.equal(zoo.logits(auto, "llama"), expected)
    # transformers reads the adapter folder, too.
    direct = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert torch.equal(zoo.logits(direct, "llama"), expected)


def test_low_cpu_mem_usage_allocates_nothing_and_draws_nothing() -> None:
    base = zoo.build("llama")
    torch.manual_seed(3)
    model = get_peft_model(base, PreskipConfig(), low_cpu_mem_usage=True)
    drawn = torch.rand(1)
    assert {p.device.type for key, p in model.named_parameters() if ".preskip." in key} == {"meta"}
    assert {p.device.type for key, p in model.named_parameters() if ".preskip." not in key} == {"cpu"}
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)


def test_low_cpu_mem_usage_loads_weights_of_16_bits_in_float32(tmp_path) -> None:
    model = get_peft_model(zoo.build("llama"), PreskipConfig())
    zoo.randomise(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = [
        PeftModel.from_pretrained(zoo.build("llama"), tmp_path, low_cpu_mem_usage=low, autocast_adapter_dtype=False)
        for low in (False, True)
    ]
    assert {p.dtype for p in loaded[1].parameters()} == {torch.float32}
    assert torch.equal(*(zoo.logits(model.eval(), "llama") for model in loaded))


@zoo.takes_this_peft
def test_transformers_own_adapter_methods(tmp_path) -> None:
    model = zoo.build("llama")
    untouched = zoo.logits(model, "llama")
    model.add_adapter(PreskipConfig(), adapter_name="first")
    assert torch.equal(zoo.logits(model, "llama"), untouched)
    zoo.randomise(model)
    first = zoo.logits(model, "llama")
    model.save_pretrained(tmp_path)

    other = zoo.build("llama")
    other.load_adapter(tmp_path, adapter_name="loaded")
    assert torch.equal(zoo.logits(other, "llama"), first)

    model.add_adapter(PreskipConfig(skip_rank=2), adapter_name="second")
    zoo.randomise(model, seed=8)
    second = zoo.logits(model, "llama")
    assert zoo.difference(first, second) > 1e-2
    model.load_adapter(tmp_path, adapter_name="third")
    model.set_adapter("first")
    assert torch.equal(zoo.logits(model, "llama"), first)
    model.set_adapter("third")
    assert torch.equal(zoo.logits(model, "llama"), first)
    model.set_adapter("second")
    assert torch.equal(zoo.logits(model, "llama"), second)
    model.disable_adapters()
    assert torch.equal(zoo.logits(model, "llama"), untouched)
    model.enable_adapters()
    model.delete_adapter("second")
    model.set_adapter("first")
    assert torch.equal(zoo.logits(model, "llama"), first)
    model.delete_adapter(["first", "third"])
    assert torch.equal(zoo.logits(model, "llama"), untouched)
    model.add_adapter(PreskipConfig(), adapter_name="first")
    assert torch.equal(zoo.logits(model, "llama"), untouched)


def test_several_adapters_in_one_model(tmp_path) -> None:
    model = adapted()
    first = zoo.logits(model, "llama")
    model.add_adapter("second", PreskipConfig(activation="relu", layers_to_transform=[1]))
    assert torch.equal(zoo.logits(model, "llama"), first)
    model.set_adapter("second")
    assert [key for key, p in model.named_parameters() if p.requires_grad] == [
        f"base_model.model.model.layers.1.self_attn.preskip.{part}.second.weight" for part in ("up", "down", "skip")
    ]
    zoo.randomise(model, seed=9)
    second = zoo.logits(model, "llama")
    alone = get_peft_model(zoo.build("llama"), PreskipConfig(activation="relu", layers_to_transform=[1])).eval()
    zoo.randomise(alone, seed=9)
    assert torch.equal(zoo.logits(alone, "llama"), second)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(zoo.build("llama"), tmp_path).eval()
    loaded.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(zoo.logits(loaded, "llama"), first)
    loaded.set_adapter("second")
    assert torch.equal(zoo.logits(loaded, "llama"), second)

    model.delete_adapter("default")
    assert torch.equal(zoo.logits(model, "llama"), second)
    assert not any(".default." in key for key in model.state_dict())
    model.set_adapter("second")
    with model.disable_adapter():
        assert torch.equal(zoo.logits(model, "llama"), zoo.logits(zoo.build("llama"), "llama"))


def test_two_active_adapters_add_up() -> None:
    model = adapted()
    model.add_adapter("second", PreskipConfig())
    layer = next(module for module in model.modules() if isinstance(module, PreskipLayer))
    model.base_model.set_adapter(["default", "second"])
    generator = torch.Generator().manual_seed(1)
    w = {}
    with torch.no_grad():
        for part in ("up", "down", "skip"):
            for name in ("default", "second"):
                weight = layer.linears(name)[part].weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
                w[part, name] = weight.double()
        x = torch.randn(2, 5, zoo.WIDTH, generator=generator)
        attention_input = layer.enrich(x)
        names = ("default", "second")
        silu = torch.nn.functional.silu
        expected = x.double() + sum(silu(x.double() @ w["up", n].T) @ w["down", n].T for n in names)
        assert zoo.difference(attention_input, expected) < 1e-5
        assert zoo.difference(layer.content(attention_input), sum(expected @ w["skip", n].T for n in names)) < 1e-4


@pytest.mark.parametrize(
    ("task", "name", "cls", "head"),
    [
        ("SEQ_CLS", "llama", "LlamaForSequenceClassification", "score"),
        ("SEQ_CLS", "bert", "BertForSequenceClassification", "classifier"),
        ("TOKEN_CLS", "bert", "BertForTokenClassification", "classifier"),
        ("TOKEN_CLS", "llama", "LlamaForTokenClassification", "score"),
        ("FEATURE_EXTRACTION", "bert", "BertModel", None),
    ],
)
def test_tasks_train_and_save_their_head(task: str, name: str, cls: str, head: str | None, tmp_path) -> None:
    build = lambda: zoo.build(name, model=cls)  # noqa: E731
    run = lambda m: m(**zoo.inputs(name))[0].detach()  # noqa: E731
    untouched = run(build())
    model = get_peft_model(build(), PreskipConfig(task_type=task)).eval()
    assert torch.equal(run(model), untouched)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert {".preskip." in key or f".{head}." in key for key in trained} == {True}
    assert any(f".{head}." in key for key in trained) == (head is not None)
    zoo.randomise(model)
    changed = run(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path).eval()
    assert torch.equal(run(loaded), changed)
    # As with PEFT's other methods the trained head stays when the branches go.
    plain, reference = model.unload(), build()
    assert list(plain.state_dict()) == list(reference.state_dict())
    if head is not None:
        reference.get_submodule(head).load_state_dict(plain.get_submodule(head).state_dict())
    assert torch.equal(run(plain), run(reference))


def test_a_head_of_another_name_than_peft_expects_is_asked_for() -> None:
    build = lambda: zoo.build("bart", model="BartForSequenceClassification")  # noqa: E731
    with pytest.raises(PreskipError, match=r"PEFT's names .* own head, e\.g\. .*=\['classification_head'\]"):
        get_peft_model(build(), PreskipConfig(task_type="SEQ_CLS"))
    model = get_peft_model(build(), PreskipConfig(task_type="SEQ_CLS", modules_to_save=["classification_head"]))
    assert any("classification_head" in key and p.requires_grad for key, p in model.named_parameters())


def test_modules_to_save() -> None:
    model = adapted(modules_to_save=["lm_head"])
    trained = [key for key, p in model.named_parameters() if p.requires_grad and ".preskip." not in key]
    assert trained == ["base_model.model.lm_head.modules_to_save.default.weight"]
    with model.disable_adapter():
        assert torch.equal(zoo.logits(model, "llama"), zoo.logits(zoo.build("llama"), "llama"))


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_with_its_reason(method: str) -> None:
    model = adapted()
    before = zoo.logits(model, "llama")
    with pytest.raises(NotImplementedError, match="depends non-linearly on its input and cannot be merged"):
        getattr(model, method)()
    assert torch.equal(zoo.logits(model, "llama"), before)


@torch.no_grad()
def test_each_row_of_a_mixed_batch_is_as_with_its_adapter_alone() -> None:
    model = adapted("gemma2", skip_position="residual")
    model.add_adapter("second", PreskipConfig(skip_position="residual", gated=True))
    model.add_adapter("third", PreskipConfig(skip_position="residual", enrich_attention=False, layers_to_transform=[1]))
    for seed, name in ((4, "second"), (5, "third")):
        model.set_adapter(name)
        zoo.randomise(model, seed=seed)
    values = zoo.inputs("gemma2", batch=5)
    alone = {}
    for name in ("default", "second", "third"):
        model.set_adapter(name)
        alone[name] = model.eval()(**values).logits
    with model.disable_adapter():
        alone["__base__"] = model(**values).logits
    names = ["second", "__base__", "default", "third", "second"]
    mixed = model(**values, adapter_names=names).logits
    for row, name in enumerate(names):
        assert zoo.difference(mixed[row], alone[name][row]) < 1e-5, name
    assert zoo.difference(alone["default"], alone["second"]) > 0.1
    assert torch.equal(model(**values).logits, alone["third"]), "the active adapter is as before"
    # Beams: each prompt's rows follow each other.
    ids = values["input_ids"][:2]
    beams = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    both = model.generate(input_ids=ids, adapter_names=["second", "default"], **beams)
    for row, name in enumerate(("second", "default")):
        model.set_adapter(name)
        assert torch.equal(both[row], model.generate(input_ids=ids[row : row + 1], **beams)[0])


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@torch.no_grad()
def test_a_name_is_for_one_row_or_for_all(task_type) -> None:
    model = adapted(task_type=task_type)
    model.add_adapter("second", PreskipConfig(init_weights="paper", init_std=0.3))
    ids = zoo.inputs("llama", batch=4)["input_ids"]
    embedded = model.get_input_embeddings()(ids)
    two = {"adapter_names": ["default", "second"]}
    calls = (
        lambda: model(input_ids=ids, **two),
        lambda: model(ids, **two),
        lambda: model(inputs_embeds=embedded, **two),
        lambda: model.generate(input_ids=ids, max_new_tokens=1, **two),
        lambda: model.generate(inputs=ids, max_new_tokens=1, **two),
        lambda: model.generate(inputs_embeds=embedded, max_new_tokens=1, **two),
    )
    for call in calls:
        with pytest.raises(PreskipError, match="2 adapter names do not fit a batch of 4 rows: give one name per row"):
            call()
    for_all = model(input_ids=ids, adapter_names=["second"]).logits
    model.set_adapter("second")
    assert torch.equal(for_all, model(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["vit", "whisper"])
def test_names_that_do_not_fit_pictures_or_sound_are_refused(name) -> None:
    model = adapted(name)
    values = zoo.inputs(name, batch=4)
    if name == "whisper":
        del values["decoder_input_ids"]
    with pytest.raises(PreskipError, match="2 adapter names do not fit a batch of 4 rows"):
        model(**values, adapter_names=["default", "__base__"])
    if name == "vit":
        assert model(**values, adapter_names=["default"] * 4).logits.shape[0] == 4


@pytest.mark.parametrize("names", [["default", "fourth"], [], ["default", "default", "default"]])
def test_names_that_do_not_fit_a_batch_are_refused(names) -> None:
    model = adapted()
    with pytest.raises(PreskipError, match=r"adapter_names=|adapter names do not fit a batch of 2 rows"):
        model(**zoo.inputs("llama"), adapter_names=names)
    assert model.base_model.model.model.layers[0].self_attn.preskip.row_names is None
    with pytest.raises(PreskipError, match="is for inference"):
        model.train()(**zoo.inputs("llama"), adapter_names=["default"])
    model.eval()
    with (
        model._enable_peft_forward_hooks(adapter_names=["default"]),
        pytest.raises(PreskipError, match="another call with adapter_names has not ended: of several threads let one"),
    ):
        model(**zoo.inputs("llama"), adapter_names=["default"])
    model(**zoo.inputs("llama"), adapter_names=["default"])


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_deep_copy_is_independent(name: str) -> None:
    model = adapted(name)
    before = zoo.logits(model, name)
    twin = copy.deepcopy(model)
    assert torch.equal(zoo.logits(twin, name), before)
    zoo.randomise(twin, seed=11)
    assert zoo.difference(zoo.logits(twin, name), before) > 1e-3
    assert torch.equal(zoo.logits(model, name), before)
    assert torch.equal(zoo.logits(twin.unload(), name), zoo.logits(zoo.build(name), name))
    assert torch.equal(zoo.logits(model, name), before)


def test_unloading_leaves_the_base_free_for_another_method() -> None:
    model = adapted()
    base = model.unload()
    again = get_peft_model(base, PreskipConfig()).eval()
    assert torch.equal(zoo.logits(again, "llama"), zoo.logits(zoo.build("llama"), "llama"))


def test_a_second_import_leaves_peft_to_be_found() -> None:
    before = list(sys.meta_path)
    importlib.reload(preskip)
    assert sys.meta_path == before
    assert importlib.util.find_spec("peft") is not None


def test_dropout_without_a_preprojection_is_harmless() -> None:
    """There is nothing to drop then; the skip alone is linear in the attention's input."""
    model = get_peft_model(zoo.build("llama"), PreskipConfig(preprojection=False, dropout=0.3))
    zoo.randomise(model)
    model.train()
    first, second = (zoo.logits(model, "llama") for _ in range(2))
    assert zoo.difference(first, second) == 0.0


def test_an_adapter_that_was_deleted_is_loaded_again(tmp_path) -> None:
    for name, config in {"preskip": PreskipConfig(), "lora": LoraConfig(target_modules=["q_proj"])}.items():
        model = get_peft_model(zoo.build("llama"), config).eval()
        zoo.randomise(model)
        wanted = zoo.logits(model, "llama")
        model.save_pretrained(tmp_path / name)
        model.delete_adapter("default")
        with pytest.raises(PreskipError, match="has no Preskip adapter to bake"):
            preskip.bake(model, tmp_path / "baked")
        model.load_adapter(tmp_path / name, "default")
        model.set_adapter("default")
        assert torch.equal(zoo.logits(model.eval(), "llama"), wanted)


@pytest.mark.parametrize(
    "config",
    [
        PreskipConfig(),
        LoraConfig(target_modules=["q_proj"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
    ],
    ids=lambda config: type(config).__name__,
)
def test_the_base_inside_is_found_whatever_the_method(config) -> None:
    base = zoo.build("llama")
    assert base_model(base) is base
    model = get_peft_model(base, config)
    assert base_model(model) is model.get_base_model() is base
