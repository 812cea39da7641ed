"""Which attentions get a branch, and the refusals: never a silent half, never a half-changed model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn

import zoo
from preskip import PreskipConfig, PreskipError
from preskip.adapter import PreskipLayer

VISION = r".*vision.*\.self_attn"


def adapted(model: nn.Module) -> list[str]:
    return [
        path.removeprefix("base_model.model.").removesuffix(".preskip")
        for path, module in model.named_modules()
        if isinstance(module, PreskipLayer)
    ]


def fingerprint(model: nn.Module) -> tuple:
    """What an injection changes: modules, hooks, trainability, PEFT's marks."""
    return (
        [key for key, _ in model.named_modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [(key, p.requires_grad) for key, p in model.named_parameters()],
        sorted(getattr(model, "peft_config", {})),
        getattr(model, "_hf_peft_config_loaded", False),
    )


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, [0, 1, 2, 3]),
        ({"layers_to_transform": [1, 3]}, [1, 3]),
        ({"layers_to_transform": 2}, [2]),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, [0]),
        ({"target_modules": ["self_attn"]}, [0, 1, 2, 3]),
        ({"target_modules": ["self_attn"], "layers_to_transform": [2, 3]}, [2, 3]),
        ({"target_modules": r".*\.[12]\.self_attn"}, [1, 2]),
        ({"target_modules": ["layers.3.self_attn"]}, [3]),
        ({"exclude_modules": r".*layers\.0\..*"}, [1, 2, 3]),
        ({"exclude_modules": ["layers.1.self_attn"]}, [0, 2, 3]),
    ],
)
def test_targets_on_four_layers(settings: dict, layers: list[int], tmp_path) -> None:
    build = lambda: zoo.build("llama", num_hidden_layers=4)  # noqa: E731
    model = get_peft_model(build(), PreskipConfig(**settings))
    names = [f"model.layers.{layer}.self_attn" for layer in layers]
    assert adapted(model) == names
    zoo.randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert adapted(loaded) == names
    assert zoo.difference(zoo.logits(loaded, "llama"), zoo.logits(model, "llama")) == 0.0


@pytest.mark.parametrize("name", ["llava", "gemma3_vision"])
@pytest.mark.parametrize("layers", [None, [1], 0])
def test_vision_language_models_get_branches_in_the_text_decoder_only(name: str, layers, tmp_path) -> None:
    model = get_peft_model(zoo.build(name), PreskipConfig(layers_to_transform=layers))
    chosen = [0, 1] if layers is None else [layers] if isinstance(layers, int) else layers
    names = [f"model.language_model.layers.{layer}.self_attn" for layer in chosen]
    assert adapted(model) == names
    zoo.randomise(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(zoo.build(name), tmp_path)
    assert adapted(loaded) == names
    assert zoo.difference(zoo.logits(loaded, name), zoo.logits(model, name)) == 0.0


def test_a_vision_tower_can_be_named() -> None:
    model = get_peft_model(zoo.build("llava"), PreskipConfig(target_modules=VISION))
    assert len(adapted(model)) == 2
    assert all("vision" in name for name in adapted(model))
    assert {layer.width for layer in model.modules() if isinstance(layer, PreskipLayer)} == {24}


def test_the_vision_encoder_of_git_gets_no_branch() -> None:
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    settings = {**zoo.FULL, "vision_config": {**vision, "image_size": zoo.IMAGE_SIZE, "patch_size": 8}}
    model = transformers.GitForCausalLM(transformers.GitConfig(**settings)).eval()
    before = zoo.logits(model, "llava")
    with pytest.raises(PreskipError, match=r"layers_to_transform=\[3\] .* has attention in layers 0 to 1"):
        get_peft_model(model, PreskipConfig(layers_to_transform=[3]))
    wrapped = get_peft_model(model, PreskipConfig())
    assert adapted(wrapped) == [f"git.encoder.layer.{layer}.attention.self" for layer in range(2)]
    assert torch.equal(zoo.logits(wrapped, "llava"), before)


def test_a_list_of_blocks_is_chosen_among_several_by_default_targets_too() -> None:
    config = PreskipConfig(layers_to_transform=[0], layers_pattern="decoder.layers")
    model = get_peft_model(zoo.build("bart"), config)
    assert adapted(model) == ["model.decoder.layers.0.self_attn"]
    both = PreskipConfig(layers_to_transform="attention", layers_pattern=["encoder.layers"])
    model = get_peft_model(zoo.build("bart"), both)
    assert adapted(model) == [f"model.encoder.layers.{layer}.self_attn" for layer in range(2)]
    with pytest.raises(PreskipError, match="layers_pattern='blocks' is no list of blocks: choose among"):
        get_peft_model(zoo.build("llama"), PreskipConfig(layers_to_transform=[0], layers_pattern="blocks"))


def test_a_config_serves_several_models() -> None:
    config = PreskipConfig(layers_to_transform="attention")
    first = get_peft_model(zoo.build("lfm2"), config)
    kinds = ["conv", *["full_attention"] * 3]
    second = get_peft_model(zoo.build("lfm2", num_hidden_layers=4, layer_types=kinds), config)
    assert adapted(first) == ["model.layers.1.self_attn"]
    assert adapted(second) == [f"model.layers.{layer}.self_attn" for layer in (1, 2, 3)]
    chosen = [model.peft_config["default"].layers_to_transform for model in (first, second)]
    assert chosen == [[1], [1, 2, 3]]


@pytest.mark.parametrize(
    ("task", "kind"), [("SEQ_CLS", "ForSequenceClassification"), ("TOKEN_CLS", "ForTokenClassification")]
)
def test_a_config_of_a_task_serves_several_models(task: str, kind: str) -> None:
    config = PreskipConfig(task_type=task)
    bert = get_peft_model(zoo.build("bert", model=f"Bert{kind}"), config)
    llama = get_peft_model(zoo.build("llama", model=f"Llama{kind}"), config)
    assert [len(adapted(model)) for model in (bert, llama)] == [2, 2]
    assert bert.peft_config["default"].target_modules == {"attention.self"}


def test_a_router_of_the_name_of_a_part_of_the_branch_is_trained(tmp_path) -> None:
    model = get_peft_model(zoo.build("mixtral"), PreskipConfig(gated=True, modules_to_save=["gate"]))
    zoo.randomise(model)
    trained = {key for key, p in model.named_parameters() if p.requires_grad and ".preskip." not in key}
    assert trained == {f"base_model.model.model.layers.{i}.mlp.gate.modules_to_save.default.weight" for i in range(2)}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(zoo.build("mixtral"), tmp_path)
    assert torch.equal(zoo.logits(loaded, "mixtral"), zoo.logits(model, "mixtral"))
    assert PreskipConfig(modules_to_save="lm_head").modules_to_save == ["lm_head"]


def test_no_trained_copy_is_left_where_the_next_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(wrapper) -> None:
        if isinstance(wrapper.original_module, nn.Linear):
            raise TypeError("not this one")

    monkeypatch.setattr(ModulesToSaveWrapper, "check_module", refuse)
    model = zoo.build("llama")
    before = fingerprint(model)
    with pytest.raises(TypeError, match="not this one"):
        get_peft_model(model, PreskipConfig(modules_to_save=["embed_tokens", "lm_head"]))
    assert fingerprint(model) == before


def test_branches_have_the_width_of_their_own_attention() -> None:
    model = get_peft_model(zoo.build("llava"), PreskipConfig(target_modules=["self_attn"]))
    widths = {("vision" in path): m.width for path, m in model.named_modules() if isinstance(m, PreskipLayer)}
    assert widths == {True: 24, False: 32}


class Hybrid(nn.Module):
    """Attention in blocks 0 and 2 only."""

    def __init__(self) -> None:
        super().__init__()
        llama = zoo.build("llama", num_hidden_layers=4)
        self.config = llama.config
        self.layers = llama.model.layers
        for index in (1, 3):
            self.layers[index].token_mixer = self.layers[index].self_attn
            del self.layers[index].self_attn


def test_blocks_without_attention_are_named_and_can_be_left_out() -> None:
    model = Hybrid()
    before = fingerprint(model)
    with pytest.raises(
        PreskipError, match=r"Hybrid has blocks without .*: layers.1, layers.3; give .*=\[0, 2\] or .*='attention'"
    ):
        get_peft_model(model, PreskipConfig())
    with pytest.raises(PreskipError, match=r"layers_to_transform=\[1\].*Hybrid has attention in layers \[0, 2\]"):
        get_peft_model(model, PreskipConfig(layers_to_transform=[1]))
    assert fingerprint(model) == before
    assert adapted(get_peft_model(model, PreskipConfig(layers_to_transform=[0, 2]))) == [
        "layers.0.self_attn",
        "layers.2.self_attn",
    ]


REFUSED = {
    "no_layer": ("llama", {"layers_to_transform": [0, 2]}, r"layers_to_transform=\[0, 2\].*attention in layers 0 to 1"),
    "negative": ("llama", {"layers_to_transform": -1}, r"layers_to_transform=\[-1\] is not possible"),
    "empty": ("llama", {"layers_to_transform": []}, r"layers_to_transform=\[\] is not possible"),
    "empty_of_targets": (
        "llama", {"target_modules": ["self_attn"], "layers_to_transform": []}, r"layers_to_transform=\[\] is not",
    ),
    "no_layer_of_targets": (
        "llama", {"target_modules": ["self_attn"], "layers_to_transform": [0, 7]}, "layer 7 gets no branch",
    ),
    "linear": ("llama", {"target_modules": ["q_proj"]}, r"self_attn.q_proj \(Linear\) is not an attention module"),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"]}, r"c_attn \(Conv1D\) is not an attention module"),
    "mlp": ("llama", {"target_modules": ["mlp"]}, r"mlp \(LlamaMLP\) is not an attention module"),
    "block": ("llama", {"target_modules": r"model\.layers\.\d"}, r"\(LlamaDecoderLayer\) is not an attention module"),
    "embedding": ("llama", {"target_modules": ["embed_tokens"]}, r"embed_tokens \(Embedding\) is not"),
    "bert_whole": ("bert", {"target_modules": ["attention"]}, "target attention.self"),
    "nothing": ("llama", {"target_modules": ["attn_x"]}, r"match nothing.*its attentions are called self_attn"),
    "rank": ("llama", {"skip_rank": 33}, "skip_rank=33 exceeds the width 32"),
    "modules_to_save": ("llama", {"modules_to_save": ["nowhere"]}, r"modules_to_save=\['nowhere'\] match nothing"),
    "excluded": ("llama", {"exclude_modules": ["self_attn"]}, "match nothing"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_model_and_config_as_they_were(case: str) -> None:
    name, settings, message = REFUSED[case]
    model, config = zoo.build(name), PreskipConfig(**settings)
    before, targets = fingerprint(model), config.target_modules
    with pytest.raises(PreskipError, match=message) as caught:
        get_peft_model(model, config)
    assert "\n" not in str(caught.value)
    assert fingerprint(model) == before
    assert config.target_modules == targets
    # The model is as usable as before.
    assert len(adapted(get_peft_model(model, PreskipConfig()))) == 2


@zoo.takes_this_peft
@pytest.mark.parametrize("case", REFUSED)
def test_so_do_those_through_transformers(case: str) -> None:
    name, settings, message = REFUSED[case]
    model = zoo.build(name)
    before = fingerprint(model)
    with pytest.raises(PreskipError, match=message):
        model.add_adapter(PreskipConfig(**settings))
    assert fingerprint(model) == before
    model.add_adapter(PreskipConfig())
    assert len(adapted(model)) == 2


def test_a_failure_half_way_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("bert")
    before = fingerprint(model)
    original, calls = PreskipLayer.update_layer, []

    def fail_the_second_time(self, *args, **kwargs):
        calls.append(self)
        if len(calls) % 2 == 0:
            raise MemoryError("no room")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(PreskipLayer, "update_layer", fail_the_second_time)
    with pytest.raises(MemoryError):
        get_peft_model(model, PreskipConfig())
    assert fingerprint(model) == before
    monkeypatch.undo()

    adapter = get_peft_model(model, PreskipConfig())
    zoo.randomise(adapter)
    logits, with_one = zoo.logits(adapter, "bert"), fingerprint(adapter)
    monkeypatch.setattr(PreskipLayer, "update_layer", fail_the_second_time)
    with pytest.raises(MemoryError):
        adapter.add_adapter("second", PreskipConfig(gated=True))
    assert fingerprint(adapter) == with_one
    assert list(adapter.peft_config) == ["default"]
    assert torch.equal(zoo.logits(adapter, "bert"), logits)


@pytest.mark.parametrize("kind", ["xlnet", "mamba"])
def test_unknown_models_are_refused_with_what_they_have(kind: str) -> None:
    if kind == "xlnet":
        config = transformers.XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=4, d_inner=32)
        model, found = transformers.XLNetLMHeadModel(config), "transformer.layer: rel_attn, ff"
    else:
        config = transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
        model, found = transformers.MambaForCausalLM(config), "backbone.layers: norm, mixer"
    before = fingerprint(model)
    with pytest.raises(PreskipError, match=r"no self-attention found in .*name the modules with") as caught:
        get_peft_model(model, PreskipConfig())
    assert found in str(caught.value)
    assert fingerprint(model) == before


def test_a_name_that_is_taken_is_refused() -> None:
    base = zoo.build("llama")
    model = get_peft_model(base, PreskipConfig())
    zoo.randomise(model)
    before = zoo.logits(model, "llama")
    with pytest.raises(PreskipError, match="has an adapter named 'default' already"):
        get_peft_model(model.get_base_model(), PreskipConfig())
    assert torch.equal(zoo.logits(model, "llama"), before)
    if zoo.PEFT_VERSION >= (0, 21):  # 0.20 overwrites without a word, whatever the method
        with pytest.raises(ValueError, match="already exists"):
            model.add_adapter("default", PreskipConfig())


def test_one_model_has_one_skip_position() -> None:
    model = get_peft_model(zoo.build("gemma2"), PreskipConfig())
    with pytest.raises(PreskipError, match=r"skip_position='residual' is not possible: .* all must share one"):
        model.add_adapter("other", PreskipConfig(skip_position="residual"))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("other", PreskipConfig())
    # Without a norm behind attention both positions are one.
    model = get_peft_model(zoo.build("llama"), PreskipConfig())
    model.add_adapter("other", PreskipConfig(skip_position="residual"))


def test_when_its_last_adapter_is_deleted_a_model_takes_the_other_position() -> None:
    model = get_peft_model(zoo.build("gemma2"), PreskipConfig(), adapter_name="first")
    model.delete_adapter("first")
    model.add_adapter("second", PreskipConfig(skip_position="residual"))
    model.set_adapter("second")
    zoo.randomise(model)
    base = zoo.build("gemma2")
    other = get_peft_model(base, PreskipConfig(skip_position="residual"), adapter_name="second")
    zoo.randomise(other)
    assert zoo.difference(zoo.logits(model, "gemma2"), zoo.logits(zoo.build("gemma2"), "gemma2")) > 1e-3
    assert torch.equal(zoo.logits(model, "gemma2"), zoo.logits(other, "gemma2"))


@pytest.mark.parametrize("layers", [range(2), (0, 1), np.arange(2), np.int64(1), 1])
def test_layers_of_every_kind_are_saved(layers, tmp_path) -> None:
    PreskipConfig(target_modules=["self_attn"], layers_to_transform=layers).save_pretrained(tmp_path)
    expected = [0, 1] if np.ndim(layers) else 1
    assert PreskipConfig.from_pretrained(tmp_path).layers_to_transform == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip_position": "behind"}, "skip_position='behind'"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"expansion": 0}, "expansion=0"),
        ({"target_modules": ".*attn", "layers_to_transform": [1]}, "layers_to_transform cannot be combined"),
        ({"layers_pattern": "layers"}, "layers_pattern='layers' needs layers_to_transform"),
    ],
)
def test_config_refuses_bad_values(settings: dict, message: str) -> None:
    with pytest.raises(PreskipError, match=message):
        PreskipConfig(**settings)
