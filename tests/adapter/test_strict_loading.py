"""An adapter loads whole or not at all: what is missing, too much, misshapen or not finite is named."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable

import pytest
import torch
import transformers
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, load_model, save_file, save_model

import zoo
from preskip import PreskipConfig, PreskipError
from preskip.adapter import PreskipLayer

PREFIX = "base_model.model.model.layers"
DOWN = f"{PREFIX}.1.self_attn.preskip.down.weight"
Tensors = dict[str, torch.Tensor]


def drop(t: Tensors) -> None:
    del t[DOWN]


def add_layer(t: Tensors) -> None:
    t[f"{PREFIX}.7.self_attn.preskip.down.weight"] = t[DOWN].clone()


def add_part(t: Tensors) -> None:
    t[f"{PREFIX}.0.self_attn.preskip.gate.weight"] = t[DOWN].clone()


def reshape(t: Tensors) -> None:
    t[DOWN] = t[DOWN][:-1].clone()


def poison(value: float) -> Callable[[Tensors], None]:
    def spoil(t: Tensors) -> None:
        t[DOWN][3, 4] = value

    return spoil


DAMAGES: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "missing": (drop, r"lacks \S*layers\.1\.self_attn\.preskip\.down\.\S*: it belongs to another model"),
    "missing all": (lambda t: t.clear(), "lacks .* and 5 more|no tensor that belongs"),
    "extra layer": (add_layer, r"no place for: \S*layers\.7\.self_attn\.preskip\.down"),
    "extra part": (add_part, r"no place for: \S*layers\.0\.self_attn\.preskip\.gate"),
    "wrong shape": (reshape, r"layers\.1\.self_attn\.preskip\.down\S* has shape \(31, 40\).* needs \(32, 40\)"),
    "NaN": (poison(float("nan")), r"layers\.1\.self_attn\.preskip\.down\S* holds NaN or infinity"),
    "infinity": (poison(float("-inf")), r"layers\.1\.self_attn\.preskip\.down\S* holds NaN or infinity"),
}


def from_pretrained(model, folder):
    return PeftModel.from_pretrained(model, folder)


def low_memory(model, folder):
    return PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)


def second_adapter(model, folder):
    peft_model = get_peft_model(model, PreskipConfig())
    peft_model.load_adapter(folder, adapter_name="second")
    return peft_model


def transformers_load(model, folder):
    model.load_adapter(folder)
    return model


WAYS = [from_pretrained, low_memory, second_adapter, transformers_load]


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    model = get_peft_model(zoo.build("llama"), PreskipConfig())
    zoo.randomise(model)
    model.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def damaged(folder: pathlib.Path, change: Callable[[Tensors], None]) -> pathlib.Path:
    other = folder.parent / "damaged"
    shutil.copytree(folder, other)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, other / "adapter_model.safetensors")
    return other


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(damage: str, way: Callable, folder: pathlib.Path) -> None:
    change, message = DAMAGES[damage]
    base = zoo.build("llama")
    with pytest.raises(PreskipError, match=message) as caught:
        way(base, damaged(folder, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_failed_load_through_transformers_leaves_the_model_as_it_was(damage: str, folder: pathlib.Path) -> None:
    model = zoo.build("llama")
    before = zoo.logits(model, "llama")
    broken = damaged(folder, DAMAGES[damage][0])
    with pytest.raises(PreskipError):
        model.load_adapter(broken)
    assert not any(isinstance(module, PreskipLayer) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(zoo.logits(model, "llama"), before)
    model.load_adapter(folder)
    loaded = zoo.logits(model, "llama")
    with pytest.raises(PreskipError):
        model.load_adapter(broken, adapter_name="broken")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(zoo.logits(model, "llama"), loaded)


@pytest.mark.parametrize("way", [from_pretrained, low_memory])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_failed_load_through_peft_leaves_the_base_as_it_was(damage: str, way: Callable, folder: pathlib.Path) -> None:
    base = zoo.build("llama")
    before = zoo.logits(base, "llama")
    with pytest.raises(PreskipError):
        way(base, damaged(folder, DAMAGES[damage][0]))
    assert not any(isinstance(module, PreskipLayer) for module in base.modules())
    assert not hasattr(base, "peft_config")
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert torch.equal(zoo.logits(base, "llama"), before)
    wanted = zoo.logits(way(zoo.build("llama"), folder), "llama")
    assert torch.equal(zoo.logits(way(base, folder), "llama"), wanted)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_failed_load_beside_an_adapter_leaves_that_alone(damage: str, folder: pathlib.Path) -> None:
    model = PeftModel.from_pretrained(zoo.build("llama"), folder, is_trainable=True)
    before = zoo.logits(model, "llama")
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with pytest.raises(PreskipError):
        model.load_adapter(damaged(folder, DAMAGES[damage][0]), adapter_name="second")
    assert list(model.peft_config) == ["default"]
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    assert torch.equal(zoo.logits(model, "llama"), before)
    model.load_adapter(folder, adapter_name="second")
    model.set_adapter("second")
    assert torch.equal(zoo.logits(model, "llama"), before)


def test_a_failed_load_leaves_no_copy_of_the_modules_that_it_saves(tmp_path: pathlib.Path) -> None:
    model = get_peft_model(zoo.build("llama"), PreskipConfig(modules_to_save=["lm_head"]))
    zoo.randomise(model)
    model.save_pretrained(tmp_path / "whole")
    broken, base = damaged(tmp_path / "whole", drop), zoo.build("llama")
    keys = set(base.state_dict())
    with pytest.raises(PreskipError):
        PeftModel.from_pretrained(base, broken)
    assert set(base.state_dict()) == keys
    loaded = PeftModel.from_pretrained(base, tmp_path / "whole")
    wanted = zoo.logits(loaded, "llama")
    with pytest.raises(PreskipError):
        loaded.load_adapter(broken, adapter_name="second")
    assert not any(".second." in key for key in loaded.state_dict())
    assert torch.equal(zoo.logits(loaded, "llama"), wanted)


@zoo.takes_this_peft
def test_a_failed_load_leaves_the_active_adapter_and_its_trained_head_active(tmp_path: pathlib.Path) -> None:
    config = PreskipConfig(modules_to_save=["lm_head"])
    whole = get_peft_model(zoo.build("llama"), config)
    whole.save_pretrained(tmp_path / "whole")
    broken = damaged(tmp_path / "whole", drop)
    base = zoo.build("llama")
    base.add_adapter(PreskipConfig(), "a")
    base.add_adapter(config, "c")
    zoo.randomise(base)
    trained = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    before = zoo.logits(base, "llama")
    for load in (base.load_adapter, lambda *args, **kwargs: PeftModel.from_pretrained(base, *args, **kwargs)):
        with pytest.raises(PreskipError):
            load(broken, adapter_name="x")
        assert base.active_adapters() == ["c"]
        assert torch.equal(zoo.logits(base, "llama"), before)
        assert [name for name, parameter in base.named_parameters() if parameter.requires_grad] == trained


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_without_its_trained_head_is_refused(way: Callable, tmp_path: pathlib.Path) -> None:
    model = get_peft_model(zoo.build("llama"), PreskipConfig(modules_to_save=["lm_head"]))
    model.save_pretrained(tmp_path / "whole")
    base = zoo.build("llama")
    broken = damaged(tmp_path / "whole", lambda t: t.pop("base_model.model.lm_head.weight"))
    with pytest.raises(PreskipError, match=r"the checkpoint lacks \S*lm_head\.\S*weight: it belongs") as caught:
        way(base, broken)
    assert "\n" not in str(caught.value)
    if way is not second_adapter:
        assert list(base.state_dict()) == list(zoo.build("llama").state_dict())
    if way is transformers_load and transformers.__version__.startswith("5.17."):
        with pytest.raises(
            PreskipError, match=r"transformers 5\.17\S* does not read lm_head\.weight, which was trained"
        ):
            way(zoo.build("llama"), tmp_path / "whole")
    else:
        way(zoo.build("llama"), tmp_path / "whole")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"hidden_size": 64}, r"has shape .*: the adapter was trained for another width"),
        ({"num_hidden_layers": 1}, r"no place for: \S*layers\.1\."),
        ({"num_hidden_layers": 3}, r"lacks \S*layers\.2\."),
    ],
)
def test_an_adapter_of_another_model_is_refused(way: Callable, size: dict, message: str, folder: pathlib.Path) -> None:
    with pytest.raises(PreskipError, match=message):
        way(zoo.build("llama", **size), folder)


@pytest.mark.parametrize("way", [from_pretrained, low_memory, second_adapter])
def test_a_tensor_of_the_base_model_is_refused_in_an_adapter(way: Callable, folder: pathlib.Path) -> None:
    def add(t: Tensors) -> None:
        t["base_model.model.model.norm.weight"] = torch.ones(32)

    with pytest.raises(PreskipError, match=r"no place for: .*model\.norm\.weight"):
        way(zoo.build("llama"), damaged(folder, add))


def test_settings_that_do_not_fit_the_tensors_are_refused(folder: pathlib.Path) -> None:
    path = folder / "adapter_config.json"
    for setting, message in (
        ({"expansion": 2.0}, r"has shape \(40, 32\) in the checkpoint, this model needs \(64, 32\)"),
        ({"gated": True}, r"lacks \S*preskip\.gate"),
        ({"content_skip": False}, r"no place for: \S*preskip\.skip"),
    ):
        original = path.read_text()
        path.write_text(json.dumps({**json.loads(original), **setting}))
        with pytest.raises(PreskipError, match=message):
            PeftModel.from_pretrained(zoo.build("llama"), folder)
        path.write_text(original)


def test_whole_models_and_base_checkpoints_load_as_ever(folder: pathlib.Path) -> None:
    model = PeftModel.from_pretrained(zoo.build("llama"), folder)
    expected = zoo.logits(model, "llama")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other = get_peft_model(zoo.build("llama"), PreskipConfig())
    other.load_state_dict(state)
    assert torch.equal(zoo.logits(other, "llama"), expected)
    # A base checkpoint brings no branch, and needs none, where the rest is allowed to be missing.
    base = {key: value for key, value in state.items() if ".preskip." not in key}
    report = other.load_state_dict(base, strict=False)
    assert len(report.missing_keys) == 6
    assert not report.unexpected_keys
    bare = {key.removeprefix("base_model.model."): value for key, value in base.items()}
    other.get_base_model().load_state_dict(bare, strict=False)
    assert torch.equal(zoo.logits(other, "llama"), expected)
    # A part of a branch is damage even then.
    del state[f"{PREFIX}.0.self_attn.preskip.skip.default.weight"]
    with pytest.raises(PreskipError, match=r"lacks \S*layers\.0\.self_attn\.preskip\.skip"):
        other.load_state_dict(state, strict=False)


def test_a_whole_model_of_tied_embeddings_loads(tmp_path: pathlib.Path) -> None:
    """safetensors keeps one of two tied tensors, and not always the one that torch names first."""
    models = [get_peft_model(zoo.build("gpt2"), PreskipConfig()) for _ in range(2)]
    zoo.randomise(models[0])
    save_model(models[0], tmp_path / "model.safetensors")
    assert load_model(models[1], tmp_path / "model.safetensors") == (set(), [])
    assert torch.equal(*(zoo.logits(model, "gpt2") for model in models))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_was_trained_beside_a_branch_loads_with_it() -> None:
    models = [get_peft_model(zoo.build("llama"), PreskipConfig(), adapter_name="branch") for _ in range(2)]
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    for model in models:
        get_peft_model(model.get_base_model(), config, adapter_name="ia3").requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".preskip." in name or "norm" in name)
    zoo.randomise(models[0])
    state = {key: tensor for key, tensor in models[0].named_parameters() if tensor.requires_grad or "ia3_l" in key}
    models[1].load_state_dict(state, strict=False)
    assert torch.equal(*(zoo.logits(model, "llama") for model in models))
    models[1].requires_grad_(False)
    with pytest.raises(PreskipError, match=r"no place for: \S*norm\.weight"):
        models[1].load_state_dict(state, strict=False)


def test_other_methods_load_through_transformers_untouched(tmp_path: pathlib.Path) -> None:
    from peft import LoraConfig

    model = get_peft_model(zoo.build("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    zoo.randomise(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    zoo.build("llama").load_adapter(tmp_path)


class WithHead(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = get_peft_model(zoo.build("llama"), PreskipConfig())
        self.head = torch.nn.Linear(4, 1)


def test_a_part_of_what_holds_the_model_loads_by_itself() -> None:
    model, head = WithHead(), torch.nn.Linear(4, 1).state_dict()
    report = model.load_state_dict({f"head.{key}": value for key, value in head.items()}, strict=False)
    assert not report.unexpected_keys
    assert torch.equal(model.head.weight, head["weight"])
    with pytest.raises(PreskipError, match="holds no tensor that belongs into this model"):
        model.backbone.load_state_dict({"head.weight": head["weight"]}, strict=False)


def test_a_whole_model_with_a_gap_loads_where_gaps_are_allowed(folder: pathlib.Path) -> None:
    state = PeftModel.from_pretrained(zoo.build("llama"), folder).state_dict()
    gap = "base_model.model.lm_head.weight"
    del state[gap]
    other = get_peft_model(zoo.build("llama"), PreskipConfig())
    report = other.load_state_dict(state, strict=False)
    assert report.missing_keys == [gap]
    assert not report.unexpected_keys
    assert torch.equal(
        other.state_dict()[DOWN.replace(".weight", ".default.weight")],
        load_file(folder / "adapter_model.safetensors")[DOWN],
    )
