"""Preskip and LoRA on one model, in both orders: save, load, merge LoRA while the branch stays, delete."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

import zoo
from preskip import PreskipConfig, PreskipError
from preskip.adapter import PreskipLayer

LORA_TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj"],
    "gpt_neox": ["query_key_value", "dense"],
    "bert": ["query", "value", "dense"],
    "gemma2": ["q_proj", "o_proj"],
}


def stack(name: str, preskip_first: bool, **settings):
    """(first PeftModel, second PeftModel around the same base, logits with the first alone, logits with both)."""
    lora = LoraConfig(r=4, target_modules=LORA_TARGETS[name], **settings)
    configs = {"branch": PreskipConfig(skip_position="residual"), "lora": lora}
    order = ["branch", "lora"] if preskip_first else ["lora", "branch"]
    first = get_peft_model(zoo.build(name), configs[order[0]], adapter_name=order[0]).eval()
    zoo.randomise(first)
    alone = zoo.logits(first, name)
    second = get_peft_model(first.get_base_model(), configs[order[1]], adapter_name=order[1]).eval()
    assert zoo.difference(zoo.logits(second, name), alone) <= (1e-5 if settings.get("use_dora") else 0.0)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in second.named_parameters():
            if f".{order[1]}.weight" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return first, second, alone, zoo.logits(second, name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("preskip_first", [True, False])
@pytest.mark.parametrize("name", LORA_TARGETS)
def test_both_orders(name: str, preskip_first: bool, tmp_path) -> None:
    first, second, alone, both = stack(name, preskip_first)
    assert zoo.difference(alone, both) > 1e-3
    names = [next(iter(first.peft_config)), "lora" if preskip_first else "branch"]

    first.save_pretrained(tmp_path / "first", selected_adapters=[names[0]])
    second.save_pretrained(tmp_path / "second", selected_adapters=[names[1]])
    folders = [tmp_path / "first" / names[0], tmp_path / "second" / names[1]]
    for folder, adapter in zip(folders, names, strict=True):
        tensors = load_file(folder / "adapter_model.safetensors")
        mark = ".preskip." if adapter == "branch" else ".lora_"
        assert tensors
        assert all(mark in key for key in tensors)

    one = PeftModel.from_pretrained(zoo.build(name), folders[0], adapter_name=names[0])
    two = PeftModel.from_pretrained(one.get_base_model(), folders[1], adapter_name=names[1]).eval()
    assert torch.equal(zoo.logits(two, name), both)

    with second.disable_adapter():
        assert torch.equal(zoo.logits(second, name), zoo.logits(zoo.build(name), name))
    assert torch.equal(zoo.logits(second, name), both)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("preskip_first", [True, False])
@pytest.mark.parametrize(("name", "dora"), [*((name, False) for name in LORA_TARGETS), ("llama", True), ("bert", True)])
def test_lora_is_merged_and_the_branch_stays(name: str, dora: bool, preskip_first: bool) -> None:
    first, second, _, both = stack(name, preskip_first, use_dora=dora)
    lora = second if preskip_first else first
    merged = lora.merge_and_unload(adapter_names=["lora"])
    assert zoo.difference(zoo.logits(merged, name), both) < 2e-5
    assert not any("lora_" in key for key in merged.state_dict())
    assert sum(isinstance(module, PreskipLayer) for module in merged.modules()) == zoo.LAYERS


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("adapter_names", [["lora"], None])
@pytest.mark.parametrize("name", LORA_TARGETS)
def test_lora_merged_in_place_and_back(name: str, adapter_names: list[str] | None) -> None:
    _, lora, _, both = stack(name, True)
    lora.merge_adapter(adapter_names)
    merged = [m for m in lora.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, PreskipLayer)]
    assert merged
    assert all(module.merged_adapters == ["lora"] for module in merged)
    assert zoo.difference(zoo.logits(lora, name), both) < 2e-5
    lora.unmerge_adapter()
    assert zoo.difference(zoo.logits(lora, name), both) < 2e-5
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        lora.merge_adapter(["branch"])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", LORA_TARGETS)
def test_the_branch_is_unloaded_and_lora_stays(name: str) -> None:
    lora_first, preskip, alone, _ = stack(name, False)
    assert torch.equal(zoo.logits(preskip.unload(), name), alone)
    assert torch.equal(zoo.logits(lora_first, name), alone)
    assert not any(isinstance(module, PreskipLayer) for module in lora_first.modules())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("preskip_first", [True, False])
def test_saving_after_the_branch_is_unloaded_keeps_the_saved_branch(preskip_first: bool, tmp_path) -> None:
    first, second, _, _ = stack("llama", preskip_first)
    branch, lora = (first, second) if preskip_first else (second, first)
    branch.save_pretrained(tmp_path, selected_adapters=["branch"])
    saved = load_file(tmp_path / "branch" / "adapter_model.safetensors")
    branch.unload()
    alone = zoo.logits(lora, "llama")
    lora.save_pretrained(tmp_path)
    assert list(lora.peft_config) == ["lora"]
    kept = load_file(tmp_path / "branch" / "adapter_model.safetensors")
    assert len(kept) == 3 * zoo.LAYERS
    assert kept.keys() == saved.keys()
    assert all(torch.equal(kept[key], saved[key]) for key in saved)
    again = PeftModel.from_pretrained(zoo.build("llama"), tmp_path / "lora", adapter_name="lora")
    assert torch.equal(zoo.logits(again, "llama"), alone)
    assert torch.equal(zoo.logits(branch, "llama"), alone)
    third = get_peft_model(lora.get_base_model(), PreskipConfig(), adapter_name="branch")  # the name is free again
    assert set(third.peft_config) == {"branch", "lora"}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_second_branch_joins_over_lora(name: str) -> None:
    """LoRA wraps the layer that the first branch taps: the second must find the same place."""
    _, second, _, _ = stack(name, True)
    third = get_peft_model(second.get_base_model(), PreskipConfig(), adapter_name="third").eval()
    assert set(third.peft_config) == {"branch", "lora", "third"}
    third.base_model.set_adapter("third")
    assert {n for m in third.modules() if isinstance(m, PreskipLayer) for n in m.settings} == {"branch", "third"}


def residual(**settings):
    """A Gemma 2 whose skip joins behind a norm, with random weights of the branch."""
    config = PreskipConfig(skip_position="residual", preprojection=False, **settings)
    model = get_peft_model(zoo.build("gemma2"), config, adapter_name="branch").eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in skips(model):
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def skips(model) -> list[torch.nn.Parameter]:
    return [weight for name, weight in model.named_parameters() if ".preskip.skip." in name]


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_a_copy_of_the_norm_behind_which_the_skip_joins_keeps_the_skip() -> None:
    plain, model = residual(), residual(modules_to_save=["post_attention_layernorm"])
    before = hooks(zoo.build("gemma2"))
    assert torch.equal(zoo.logits(model, "gemma2"), zoo.logits(plain, "gemma2"))
    model(**zoo.inputs("gemma2")).logits.square().mean().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in skips(model))
    base = model.unload()
    assert hooks(base) == before
    assert torch.equal(zoo.logits(base, "gemma2"), zoo.logits(zoo.build("gemma2"), "gemma2"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_ln_tuning_of_the_norm_behind_which_the_skip_joins() -> None:
    model = residual()
    wanted = zoo.logits(model, "gemma2")
    tuned = get_peft_model(model.get_base_model(), LNTuningConfig(), adapter_name="norms").eval()
    assert torch.equal(zoo.logits(tuned, "gemma2"), wanted)
    tuned.merge_and_unload(adapter_names=["norms"])
    assert torch.equal(zoo.logits(model, "gemma2"), wanted)

    tuned = get_peft_model(zoo.build("gemma2"), LNTuningConfig(), adapter_name="norms")
    with pytest.raises(PreskipError, match=r"trains the module behind .*self_attn already \(LNTuningLayer\); add the"):
        get_peft_model(tuned.get_base_model(), PreskipConfig(skip_position="residual"), adapter_name="branch")
    get_peft_model(tuned.get_base_model(), PreskipConfig(), adapter_name="branch")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_trained_copy_of_the_projection_that_the_skip_follows_keeps_the_skip() -> None:
    models = [get_peft_model(zoo.build("bert"), PreskipConfig(modules_to_save=save)) for save in (None, ["dense"])]
    zoo.randomise(models[0].eval())
    own = {key: weight for key, weight in models[0].named_parameters() if ".preskip." in key}
    with torch.no_grad():
        for key, weight in models[1].eval().named_parameters():
            if key in own:
                weight.copy_(own[key])
    assert torch.equal(*(zoo.logits(model, "bert") for model in models))


@pytest.mark.filterwarnings("ignore::UserWarning")
@zoo.asks_what_to_save
def test_a_branch_whose_trained_head_went_with_lora_is_not_saved_without_it(tmp_path) -> None:
    branch = get_peft_model(zoo.build("llama"), PreskipConfig(modules_to_save=["lm_head"]), adapter_name="branch")
    lora = get_peft_model(branch.get_base_model(), LoraConfig(target_modules=["q_proj"]), adapter_name="lora")
    branch.save_pretrained(tmp_path / "before", selected_adapters=["branch"])
    assert any("lm_head" in key for key in load_file(tmp_path / "before" / "branch" / "adapter_model.safetensors"))
    lora.merge_and_unload(adapter_names=["lora"])
    with pytest.raises(PreskipError, match="trains lm_head too, and this model has no copy of that any more"):
        branch.save_pretrained(tmp_path / "after", selected_adapters=["branch"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_branch_is_saved_and_loaded_beside_tokens_that_lora_trains(tmp_path) -> None:
    branch = get_peft_model(zoo.build("llama"), PreskipConfig(), adapter_name="branch")
    zoo.randomise(branch)
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    lora = get_peft_model(branch.get_base_model(), config, adapter_name="lora").eval()
    branch.save_pretrained(tmp_path, selected_adapters=["branch"])
    lora.save_pretrained(tmp_path, selected_adapters=["lora"])
    tensors = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("branch", "lora")}
    assert all(".preskip." in key for key in tensors["branch"])
    assert sum("trainable_tokens" in key for key in tensors["lora"]) == 1
    below = PeftModel.from_pretrained(zoo.build("llama"), tmp_path / "lora", adapter_name="lora")
    both = PeftModel.from_pretrained(below.get_base_model(), tmp_path / "branch", adapter_name="branch").eval()
    assert torch.equal(zoo.logits(both, "llama"), zoo.logits(lora, "llama"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_of_a_mixed_batch_need_a_base_without_other_adapters() -> None:
    names = {"adapter_names": ["branch", "__base__"]}
    branch, *_ = stack("llama", True)
    with pytest.raises(PreskipError, match="unload them, or take them in with merge_and_unload"):
        branch(**zoo.inputs("llama"), **names)
    _, branch, _, both = stack("llama", False)
    with pytest.raises(PreskipError, match="adapter_names does not reach adapters of another kind on this base"):
        branch(**zoo.inputs("llama"), **names)
    assert torch.equal(zoo.logits(branch, "llama"), both)
    for module in branch.modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, PreskipLayer):
            module.enable_adapters(False)
    with torch.no_grad():
        mixed = branch(**zoo.inputs("llama"), **names).logits
    assert zoo.difference(mixed[0], zoo.logits(branch, "llama")[0]) < 1e-5
    assert zoo.difference(mixed[1], zoo.logits(zoo.build("llama"), "llama")[1]) < 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("head", [None, ["lm_head"]])
def test_the_heads_that_lora_has_trained_stay_when_the_branch_is_unloaded(head, tmp_path) -> None:
    branch = get_peft_model(zoo.build("llama"), PreskipConfig(modules_to_save=head), adapter_name="branch")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    lora = get_peft_model(branch.get_base_model(), config, adapter_name="lora").eval()
    zoo.randomise(lora)
    branch.unload()
    trained = zoo.logits(lora, "llama")
    lora.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(zoo.build("llama"), tmp_path / "lora", adapter_name="lora")
    assert any("lm_head" in key for key in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    assert torch.equal(zoo.logits(again, "llama"), trained)
    with lora.disable_adapter():
        assert torch.equal(zoo.logits(lora, "llama"), zoo.logits(zoo.build("llama"), "llama"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("other", ["lora", "ia3", "norms"])
@pytest.mark.parametrize("preskip_first", [True, False])
def test_branches_stay_known_when_another_adapter_goes(preskip_first: bool, other: str, tmp_path) -> None:
    configs = {
        "branch": PreskipConfig(),
        "lora": LoraConfig(target_modules=["q_proj"]),
        "ia3": IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        "norms": LNTuningConfig(target_modules=["input_layernorm"]),
    }
    names = ["branch", other] if preskip_first else [other, "branch"]
    first = get_peft_model(zoo.build("llama"), configs[names[0]], adapter_name=names[0]).eval()
    second = get_peft_model(first.get_base_model(), configs[names[1]], adapter_name=names[1]).eval()
    zoo.randomise(second)
    models = dict(zip(names, (first, second), strict=True))
    for name, model in models.items():
        model.save_pretrained(tmp_path, selected_adapters=[name])
    saved = (tmp_path / other / "adapter_model.safetensors").read_bytes()
    assert load_file(tmp_path / other / "adapter_model.safetensors")
    merged = models[other].merge_and_unload(adapter_names=[other])
    wanted = zoo.logits(merged, "llama")
    assert list(merged.peft_config) == list(models["branch"].peft_config) == ["branch"]
    assert models[other].get_base_model() is merged

    models["branch"].save_pretrained(tmp_path)
    assert (tmp_path / other / "adapter_model.safetensors").read_bytes() == saved
    third = get_peft_model(merged, PreskipConfig(init_weights="paper"), adapter_name="third").eval()
    third.base_model.set_adapter("branch")
    assert torch.equal(zoo.logits(third, "llama"), wanted)
    third.base_model.set_adapter("third")
    third.save_pretrained(tmp_path, selected_adapters=["third"])
    assert len(load_file(tmp_path / "third" / "adapter_model.safetensors")) == 3 * zoo.LAYERS
    PeftModel.from_pretrained(zoo.build("llama"), tmp_path / "third")
    third.unload()
    assert not hasattr(merged, "peft_config")


def test_a_second_branch_beside_one_that_a_merge_has_left_is_announced_by_peft() -> None:
    branch = get_peft_model(zoo.build("llama"), PreskipConfig(), adapter_name="branch")
    with pytest.warns(UserWarning, match="multiple adapters"):
        lora = get_peft_model(branch.get_base_model(), LoraConfig(target_modules=["q_proj"]), adapter_name="lora")
    merged = lora.unload()
    with pytest.warns(UserWarning, match="multiple adapters"):
        get_peft_model(merged, PreskipConfig(), adapter_name="second")


@zoo.asks_what_to_save
def test_a_branch_is_saved_without_those_that_a_table_does_not_know(tmp_path) -> None:
    first = get_peft_model(zoo.build("llama"), PreskipConfig(), adapter_name="first")
    base = first.get_base_model()
    del base.peft_config
    second = get_peft_model(base, PreskipConfig(), adapter_name="second")
    second.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "second" / "adapter_model.safetensors")
    assert len(tensors) == 3 * zoo.LAYERS
    assert not any(".first." in key for key in tensors)
