"""`preskip_<type>`: parity with the base, the equation, initialisation, saving, generation, training modes."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.integrations import flex_attention

import equations
import zoo
from preskip.architecture import TYPES, architecture
from preskip.errors import PreskipError

ROWS = {base_type: "gemma3" if base_type == "gemma3_text" else base_type for base_type in TYPES}
WITH_IDENTITY = {"preskip_init_weights": "identity"}


def tiny(base_type: str, seed: int = 0, auto=AutoModelForCausalLM, **fields) -> nn.Module:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(f"preskip_{base_type}", **{**zoo.FAMILIES[ROWS[base_type]].settings, **fields})
    return auto.from_config(config).eval()


def plain(base_type: str, seed: int = 0) -> nn.Module:
    family = zoo.FAMILIES[ROWS[base_type]]
    torch.manual_seed(seed)
    return getattr(transformers, family.model)(getattr(transformers, family.config)(**family.settings)).eval()


def randomise(model: nn.Module) -> nn.Module:
    """Branch weights of a size at which a misplaced term shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".preskip." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def logits(model: nn.Module, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(**zoo.inputs("llama"), **kwargs).logits


@pytest.mark.parametrize("base_type", TYPES)
def test_without_branches_it_is_the_base_bit_for_bit(base_type):
    off, base = tiny(base_type, preskip_layers=[]), plain(base_type)
    assert off.state_dict().keys() == base.state_dict().keys()
    assert torch.equal(logits(off), logits(base))


@pytest.mark.parametrize("base_type", TYPES)
def test_the_base_weights_do_not_depend_on_the_branch(base_type):
    model, base = tiny(base_type), plain(base_type)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())
    assert torch.equal(logits(tiny(base_type, **WITH_IDENTITY)), logits(base))


@pytest.fixture
def as_in_a_new_process():
    """Without what transformers has learned of our inner models where they were made by AutoModel before."""
    table = getattr(transformers.modeling_utils, "_CAN_RECORD_REGISTRY", {})
    for base_type in TYPES:
        table.pop(str(architecture(base_type).model), None)


@pytest.mark.parametrize("base_type", TYPES)
def test_hidden_states_and_attentions_are_returned(base_type, as_in_a_new_process):
    wanted = {"output_hidden_states": True, "output_attentions": True}
    model, base = tiny(base_type, **WITH_IDENTITY, attn_implementation="eager"), plain(base_type)
    base.set_attn_implementation("eager")
    with torch.no_grad():
        found, expected = (m(**zoo.inputs("llama"), **wanted) for m in (model, base))
    assert len(found.hidden_states) == len(expected.hidden_states) == model.config.num_hidden_layers + 1
    assert len(found.attentions) == len(expected.attentions) == model.config.num_hidden_layers
    for ours, its in zip(
        (*found.hidden_states, *found.attentions), (*expected.hidden_states, *expected.attentions), strict=True
    ):
        assert torch.equal(ours, its)


def test_the_loss_of_the_router_is_the_bases(as_in_a_new_process):
    ids = zoo.inputs("llama")["input_ids"]
    found, expected = (
        m.train()(ids, labels=ids, output_router_logits=True)
        for m in (tiny("mixtral", **WITH_IDENTITY), plain("mixtral"))
    )
    assert len(found.router_logits) == len(expected.router_logits) > 0
    assert found.aux_loss.item() == expected.aux_loss.item() > 0
    assert found.loss.item() == expected.loss.item()


def test_trainer_smooths_shifted_labels(tmp_path):
    ids = zoo.inputs("llama")["input_ids"]
    arguments = transformers.TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    losses = [
        transformers.Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids}).item()
        for model in (tiny("llama", **WITH_IDENTITY), plain("llama"))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("base_type", TYPES)
def test_weights_start_with_the_stated_deviations(base_type):
    width = {"n_embd": 128} if base_type == "gpt2" else {"hidden_size": 128}
    model = tiny(base_type, **width, preskip_skip_init_std=2e-3)
    for name, parameter in model.named_parameters():
        if ".preskip." in name:
            expected = 2e-3 if name.endswith("skip.weight") else 0.01
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert parameter.dtype == torch.float32


@pytest.mark.parametrize("base_type", TYPES)
@pytest.mark.parametrize("position", ["attention", "residual"])
def test_the_branch_is_where_the_adapter_puts_it(base_type, position):
    """Against an independent wrapping of the base's attention, written from the equations."""
    model = randomise(tiny(base_type, preskip_skip_position=position))
    family = ROWS[base_type]
    base = zoo.build(family)
    state = model.state_dict()
    base.load_state_dict({key: value for key, value in state.items() if ".preskip." not in key})
    from peft import get_peft_model

    from preskip import PreskipConfig

    adapted = get_peft_model(base, PreskipConfig(skip_position=position)).eval()
    keys = {key: key.replace(".default.", ".") for key in adapted.base_model.model.state_dict()}
    adapted.base_model.model.load_state_dict({key: state[name] for key, name in keys.items()})
    assert torch.equal(logits(model), logits(adapted))


@pytest.mark.parametrize("base_type", ["llama", "gpt_neox", "gpt2", "gemma2"])
def test_the_whole_model_follows_the_written_out_equations(base_type):
    model = randomise(tiny(base_type, **({"preskip_skip_position": "residual"} if base_type == "gemma2" else {})))
    state = {key: value.double() for key, value in model.state_dict().items()}
    paths = [key.removesuffix("up.weight") for key in state if key.endswith(".preskip.up.weight")]
    branches = [{part: state[f"{path}{part}.weight"] for part in ("up", "down", "skip")} for path in paths]
    ids, more = zoo.inputs("llama")["input_ids"], {"gpt_neox": (True,), "gemma2": ("residual",)}.get(base_type, ())
    expected = getattr(equations, base_type)(ids, state, branches, *more)
    assert zoo.difference(logits(model.double()), expected) < 1e-6


@pytest.mark.parametrize("base_type", TYPES)
def test_saved_and_loaded_it_is_the_same(base_type, tmp_path):
    model = randomise(tiny(base_type, preskip_layers=[1]))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    inner = AutoModel.from_pretrained(tmp_path)
    assert type(inner) is architecture(base_type).model
    assert torch.equal(inner.state_dict()[_branch_key(inner)], again.state_dict()[_branch_key(again)])


def _branch_key(model: nn.Module) -> str:
    return next(key for key in model.state_dict() if ".1." in key and ".preskip.up." in key)


@pytest.mark.parametrize("base_type", TYPES)
def test_a_base_checkpoint_loads_with_branches_at_identity(base_type, tmp_path):
    base = plain(base_type)
    base.save_pretrained(tmp_path)
    family = architecture(base_type)
    config = family.config.from_pretrained(tmp_path)
    model = family.causal_lm.from_pretrained(tmp_path, config=config).eval()
    assert torch.equal(logits(model), logits(base))
    down = [value for key, value in model.state_dict().items() if ".preskip.down." in key or ".preskip.skip." in key]
    up = [value for key, value in model.state_dict().items() if ".preskip.up." in key]
    assert len(down) == 4
    assert all(not value.any() for value in down)
    assert all(value.std().item() == pytest.approx(0.01, rel=0.15) for value in up)


@pytest.mark.parametrize("base_type", TYPES)
def test_generation_with_and_without_cache_agrees(base_type):
    model = randomise(tiny(base_type))
    ids = zoo.inputs("llama")["input_ids"]
    made = {
        name: model.generate(ids, max_new_tokens=6, do_sample=False, min_new_tokens=6, **kwargs)
        for name, kwargs in {
            "cache": {},
            "no cache": {"use_cache": False},
            "static": {"cache_implementation": "static", "disable_compile": True},
        }.items()
    }
    assert torch.equal(made["cache"], made["no cache"])
    assert torch.equal(made["cache"], made["static"])
    assert made["cache"].shape[1] == ids.shape[1] + 6


def test_the_cache_holds_what_the_bases_holds():
    ids = zoo.inputs("llama")["input_ids"]
    with torch.no_grad():
        caches = [model(ids, use_cache=True).past_key_values for model in (randomise(tiny("llama")), plain("llama"))]
    shapes = [[(layer.keys.shape, layer.values.shape) for layer in cache.layers] for cache in caches]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("base_type", ["llama", "gpt_neox", "gemma3_text"])
def test_attention_implementations_agree(base_type):
    wanted = logits(randomise(tiny(base_type)))
    eager = randomise(tiny(base_type))
    eager.set_attn_implementation("eager")
    assert zoo.difference(logits(eager), wanted) < 1e-5


def test_flex_attention_agrees(monkeypatch):
    """Its kernel is PyTorch's: compiled, it says no more of ours and takes half a minute."""
    wanted = logits(randomise(tiny("llama")))
    flex = randomise(tiny("llama"))
    flex.set_attn_implementation("flex_attention")
    kernel, calls = flex_attention.compile_friendly_flex_attention, []
    monkeypatch.setattr(
        flex_attention, "compile_friendly_flex_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k)
    )
    with torch.compiler.set_stance("force_eager"):
        found = logits(flex)
    assert len(calls) == 2  # layers
    assert zoo.difference(found, wanted) < 1e-5


@pytest.mark.parametrize("base_type", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_do_not_depend_on_checkpointing(base_type, reentrant):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = randomise(tiny(base_type)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ids = zoo.inputs("llama")["input_ids"]
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    wanted, found = gradients(False), gradients(True)
    assert all(gradient is not None and gradient.any() for name, gradient in wanted.items() if ".preskip." in name)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-7) for name in wanted)


@pytest.mark.parametrize("base_type", TYPES)
def test_tying_and_resizing(base_type):
    tied = tiny(base_type, tie_word_embeddings=True)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    branches = {key: value.clone() for key, value in tied.state_dict().items() if ".preskip." in key}
    tied.resize_token_embeddings(zoo.VOCABULARY + 8)
    assert logits(tied).shape[-1] == zoo.VOCABULARY + 8
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert all(torch.equal(tied.state_dict()[key], value) for key, value in branches.items())


def test_branches_are_loaded_in_the_dtype_of_the_rest_unless_it_is_float16(tmp_path):
    model = randomise(tiny("llama"))
    model.save_pretrained(tmp_path)
    for dtype, branch in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        dtypes = {".preskip." in name: parameter.dtype for name, parameter in half.named_parameters()}
        assert dtypes == {True: branch, False: dtype}
        assert logits(half).dtype == dtype
    kept = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, preskip_keep_float32=True)
    weight = kept.model.layers[0].self_attn.preskip.up.weight
    assert torch.equal(weight, model.model.layers[0].self_attn.preskip.up.weight)
    assert kept.lm_head.weight.dtype == torch.bfloat16
    assert logits(kept).dtype == torch.bfloat16


def test_compiles_in_one_graph():
    model = randomise(tiny("llama"))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(logits(compiled), logits(model))


def test_a_copy_is_independent():
    model = randomise(tiny("gpt_neox"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".preskip." in name:
                parameter.zero_()
    assert zoo.difference(logits(other), logits(model)) > 1e-3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"preskip_expansion": 0}, "preskip_expansion=0"),
        ({"preskip_activation": "tanh"}, "preskip_activation='tanh'"),
        ({"preskip_preprojection": False, "preskip_content_skip": False}, "preskip_content_skip=False"),
        ({"preskip_preprojection": False, "preskip_gated": True}, "preskip_gated=True"),
        ({"preskip_skip_rank": 64}, "skip_rank=64 exceeds the width 32"),
        ({"preskip_skip_position": "mlp"}, "preskip_skip_position='mlp'"),
        ({"preskip_layers": [0, 2]}, r"preskip_layers=\[0, 2\]"),
        ({"preskip_layers": [0, 0]}, r"preskip_layers=\[0, 0\]"),
    ],
)
def test_contradicting_fields_are_refused_in_one_line(fields, words):
    with pytest.raises(PreskipError, match=words) as caught:
        tiny("llama", **fields)
    assert "\n" not in str(caught.value)


def test_another_type_is_refused():
    with pytest.raises(PreskipError, match="no preskip_bert architecture: choose one of llama"):
        architecture("bert")


@pytest.mark.parametrize(
    "imports",
    [
        "import transformers, preskip",
        *(
            pytest.param(other, marks=pytest.mark.slow)
            for other in (
                "from transformers import AutoModelForCausalLM; import preskip",
                "import peft, preskip; assert peft.PeftType.PRESKIP",
                "from preskip import bake",
                "import preskip; from transformers.models.auto import tokenization_auto",
            )
        ),
    ],
)
def test_importing_preskip_registers_in_any_order(imports):
    """Before all others: `test_a_new_process_loads_it`, and with PEFT the code of a card."""
    program = f"{imports}; from transformers import AutoConfig; print(AutoConfig.for_model('preskip_olmo2').model_type)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "preskip_olmo2", done.stderr


def test_importing_preskip_alone_loads_neither_torch_nor_transformers_nor_peft():
    program = "import preskip, sys; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "set()"
