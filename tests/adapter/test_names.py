"""Names of adapters: none that would lose another adapter's tensors, none that torch, a key or a folder cannot hold."""

from __future__ import annotations

import peft
import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

import zoo
from preskip import PreskipBranch, PreskipConfig, PreskipError
from preskip.adapter.names import check_adapter_name
from preskip.architecture.several import SeveralBranches
from preskip.attach import attach
from preskip.serve.by_token import ByToken


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_no_part_of_a_key_can_be_a_name(family: str) -> None:
    config = PreskipConfig(layers_to_transform=zoo.FAMILIES[family].chosen)
    model = get_peft_model(zoo.build(family), config)
    parts = {part for key in model.state_dict() for part in key.split(".")} - {"default"}
    assert len(parts) > 10
    for name in sorted(parts):
        with pytest.raises(PreskipError, match="part of the names"):
            model.add_adapter(name, config)
    assert list(model.peft_config) == ["default"]
    model.add_adapter("second", config)
    saved = peft.get_peft_model_state_dict(model)
    assert len(saved) == sum(".default." in key for key in model.state_dict())


@pytest.mark.parametrize("name", ["a.b", "a b", "", "a/b", "..", "a\tb", "keys", "train", "forward"])
def test_what_no_key_or_folder_can_hold_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(PreskipError, match="adapter_name=") as error:
        get_peft_model(zoo.build("llama"), PreskipConfig(), adapter_name=name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["content", "enrich", "row_names", "names", "__base__", "preskip_pick"])
def test_what_cannot_lie_beside_others_when_baked_is_refused_in_one_line(name: str) -> None:
    model = get_peft_model(zoo.build("llama"), PreskipConfig())
    with pytest.raises(PreskipError, match=f"adapter_name='{name}' is not possible") as error:
        model.add_adapter(name, PreskipConfig())
    assert "\n" not in str(error.value)
    assert list(model.peft_config) == ["default"]


def test_no_name_of_the_modules_that_hold_several_branches_is_possible() -> None:
    branches = {"first": PreskipBranch(8), "second": PreskipBranch(8)}
    several = SeveralBranches(8, {name: branch.settings for name, branch in branches.items()})
    attach(nn.Identity(), several)
    by_token = ByToken(branches, nn.Linear(1, 1))
    attach(nn.Identity(), by_token)
    model = zoo.build("llama")
    for name in {*dir(several), *dir(by_token)} - set(branches):
        with pytest.raises(PreskipError, match="adapter_name="):
            check_adapter_name(name, model)


@pytest.mark.parametrize("name", ["mine", "my-adapter_2", "größe", "预投影", "lora", "Default"])
def test_other_names_save_all_of_both_adapters(name: str, tmp_path) -> None:
    model = get_peft_model(zoo.build("llama"), PreskipConfig())
    model.add_adapter(name, PreskipConfig())
    zoo.randomise(model)
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / name):
        assert len(load_file(folder / "adapter_model.safetensors")) == 6


@zoo.takes_this_peft
def test_every_way_of_giving_a_name_refuses_it_and_changes_nothing(tmp_path) -> None:
    get_peft_model(zoo.build("llama"), PreskipConfig()).save_pretrained(tmp_path)
    model = zoo.build("llama")
    before = zoo.logits(model, "llama")
    keys = list(model.state_dict())
    for give in (
        lambda: get_peft_model(model, PreskipConfig(), adapter_name="up"),
        lambda: peft.PeftModel.from_pretrained(model, tmp_path, adapter_name="self_attn"),
        lambda: model.add_adapter(PreskipConfig(), adapter_name="layers"),
        lambda: model.load_adapter(tmp_path, adapter_name="0"),
    ):
        with pytest.raises(PreskipError, match="part of the names"):
            give()
        assert list(model.state_dict()) == keys
        assert zoo.difference(zoo.logits(model, "llama"), before) == 0.0
    model.add_adapter(PreskipConfig(), adapter_name="mine")
    assert model.active_adapters() == ["mine"]


@zoo.asks_what_to_save
def test_saving_refuses_to_leave_tensors_out(tmp_path) -> None:
    branch = get_peft_model(zoo.build("llama"), PreskipConfig())
    # PEFT gives other methods' adapters any name, and its filter then takes our tensors for theirs.
    get_peft_model(branch.get_base_model(), LoraConfig(target_modules=["q_proj"]), adapter_name="self_attn")
    with pytest.raises(PreskipError, match=r"cannot be saved whole: .*self_attn"):
        branch.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


@zoo.asks_what_to_save
def test_saving_refuses_an_adapter_that_was_unloaded(tmp_path) -> None:
    model = get_peft_model(zoo.build("llama"), PreskipConfig())
    model.save_pretrained(tmp_path)
    model.unload()
    with pytest.raises(PreskipError, match="'default' has no branch in this model"):
        model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 6
