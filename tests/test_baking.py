"""Baking: base + adapter becomes one checkpoint with the same logits, which is a base again."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import zoo
from preskip import PreskipConfig, PreskipError, bake
from preskip.architecture import TYPES, architecture

FAMILY = {base_type: "gemma3" if base_type == "gemma3_text" else base_type for base_type in TYPES}


def adapted(base_type: str = "llama", dtype: torch.dtype | None = None, **fields):
    model = get_peft_model(zoo.build(FAMILY[base_type], dtype=dtype), PreskipConfig(**fields))
    zoo.randomise(model)
    return model.eval()


def logits(model) -> torch.Tensor:
    return zoo.logits(model, "llama")


@pytest.mark.parametrize("base_type", TYPES)
def test_baked_it_has_the_same_logits(base_type, tmp_path):
    model = adapted(base_type)
    wanted = logits(model)
    assert bake(model, tmp_path / "out") == tmp_path / "out"
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(baked) is architecture(base_type).causal_lm
    assert baked.config.model_type == f"preskip_{base_type}"
    assert torch.equal(logits(baked), wanted)
    assert torch.equal(logits(model), wanted)  # the adapted model is as before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


BAKED = {"gpt_neox_sequential", *FAMILY.values()}


@pytest.mark.parametrize("name", sorted(zoo.FAMILIES.keys() - BAKED))
def test_every_other_family_is_refused_in_one_line_and_nothing_is_left(name, tmp_path):
    config = PreskipConfig(layers_to_transform=zoo.FAMILIES[name].chosen)
    with pytest.raises(PreskipError, match="cannot be baked") as caught:
        bake(get_peft_model(zoo.build(name), config), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fields",
    [
        {"gated": True, "activation": "gelu", "expansion": 0.5},
        {"skip_rank": 4},
        {"content_skip": False},
        {"preprojection": False},
        {"enrich_attention": False},
        {"enrich_attention": False, "content_skip": False},
        {"layers_to_transform": [1]},
        {"modules_to_save": ["lm_head"]},
        {"dropout": 0.3},
    ],
    ids=str,
)
def test_every_setting_is_kept(fields, tmp_path):
    model = adapted(**fields)
    bake(model, tmp_path / "out")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(baked), logits(model))
    for name, value in fields.items():
        if name in ("layers_to_transform", "modules_to_save"):
            continue
        assert getattr(baked.config, f"preskip_{name}") == value
    assert baked.config.preskip_layers == fields.get("layers_to_transform")


@pytest.mark.parametrize("base_type", ["gemma2", "gemma3_text", "olmo2"])
def test_a_skip_behind_the_norm_is_kept(base_type, tmp_path):
    model = adapted(base_type, skip_position="residual")
    bake(model, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(model))


@pytest.mark.parametrize("keep", [False, True])
def test_a_bfloat16_base_bakes_to_the_same_bits_with_and_without_float32_masters(keep, tmp_path):
    model = half_precision_adapter(tmp_path, torch.bfloat16)
    bake(model, tmp_path / "out", keep_float32=keep)
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert branch_dtypes(baked) == {torch.float32 if keep else torch.bfloat16}
    assert {p.dtype for name, p in baked.named_parameters() if ".preskip." not in name} == {torch.bfloat16}
    assert torch.equal(logits(baked), logits(model))
    masters = model.state_dict()["base_model.model.model.layers.0.self_attn.preskip.up.default.weight"]
    stored = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.preskip.up.weight"]
    assert torch.equal(stored, masters if keep else masters.to(torch.bfloat16))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert branch_dtypes(whole) == {torch.float32}


def test_training_a_half_precision_branch_warns(tmp_path):
    model = half_precision_adapter(tmp_path, torch.bfloat16)
    bake(model, tmp_path / "half")
    bake(model, tmp_path / "masters", keep_float32=True)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    with pytest.warns(UserWarning, match="hardly move .* keep_float32=True"):
        half.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AutoModelForCausalLM.from_pretrained(tmp_path / "masters", dtype="auto").train()
        half.requires_grad_(False).train()


def test_a_float16_base_keeps_the_branch_in_float32(tmp_path):
    model = half_precision_adapter(tmp_path, torch.float16)
    bake(model, tmp_path / "out")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert branch_dtypes(baked) == {torch.float32}
    assert torch.equal(logits(baked), logits(model))


def half_precision_adapter(folder, dtype):
    zoo.build("llama", dtype=dtype).save_pretrained(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype), PreskipConfig()).eval()
    zoo.randomise(model)
    return model


def branch_dtypes(model):
    return {p.dtype for name, p in model.named_parameters() if ".preskip." in name}


def test_a_head_trained_apart_from_the_embedding_it_was_tied_to_is_a_tensor_of_its_own(tmp_path):
    model = get_peft_model(zoo.build("llama", tie_word_embeddings=True), PreskipConfig(modules_to_save=["lm_head"]))
    zoo.randomise(model)
    bake(model, tmp_path / "out")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not baked.config.tie_word_embeddings
    assert not torch.equal(baked.lm_head.weight, baked.model.embed_tokens.weight)
    assert torch.equal(logits(baked), logits(model.eval()))


def test_tied_embeddings_stay_tied(tmp_path):
    model = get_peft_model(zoo.build("llama", tie_word_embeddings=True), PreskipConfig())
    zoo.randomise(model)
    bake(model, tmp_path / "out")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert baked.lm_head.weight is baked.model.embed_tokens.weight
    assert torch.equal(logits(baked), logits(model.eval()))


def test_one_of_several_adapters(tmp_path):
    model = adapted()
    model.add_adapter("other", PreskipConfig(expansion=0.5))
    zoo.randomise(model, seed=9)
    first = logits(model)
    model.set_adapter("other")
    zoo.randomise(model, seed=10)
    second = logits(model)
    assert zoo.difference(first, second) > 1e-3
    bake(model, tmp_path / "active")
    bake(model, tmp_path / "default", adapter="default")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "active").eval()), second)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "default").eval()), first)
    with pytest.raises(PreskipError, match="no Preskip adapter 'third'"):
        bake(model, tmp_path / "third", adapter="third")
    with pytest.raises(PreskipError, match=r"adapter=\[\] names none: give a name, several, or None"):
        bake(model, tmp_path / "none", adapter=[])


def test_lora_stacked_on_the_adapter_can_be_merged_and_baked_with_it(tmp_path):
    below = adapted()
    stacked = get_peft_model(below.get_base_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    merged = stacked.eval().merge_and_unload()
    bake(merged, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(merged))


@zoo.takes_this_peft
def test_an_adapter_added_through_transformers(tmp_path):
    base = zoo.build("llama")
    base.add_adapter(PreskipConfig())
    for name, parameter in base.named_parameters():
        if ".preskip." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    bake(base, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(base))


PROGRAM = """
import sys, torch
{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code={trust}).eval()
model.save_pretrained(sys.argv[2])
print(len(model(torch.arange(8)[None], output_hidden_states=True).hidden_states))
print(type(model).__name__, model(torch.arange(8)[None]).logits.double().sum().item())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("imports", "trust"), [("import preskip", False), ("", True)])
def test_a_new_process_loads_it(imports, trust, tmp_path):
    model = adapted()
    bake(model, tmp_path / "out")
    with torch.no_grad():
        wanted = model(torch.arange(8)[None]).logits.double().sum().item()
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        PROGRAM.format(imports=imports, trust=trust),
        str(tmp_path / "out"),
        str(tmp_path / "again"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    hidden_states, name, total = done.stdout.split()[-3:]
    assert int(hidden_states) == model.config.num_hidden_layers + 1
    assert name == "PreskipLlamaForCausalLM"
    assert float(total) == wanted
    for name in ("config.json", "modeling_preskip.py"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_the_stub_names_classes_that_exist(tmp_path):
    bake(adapted("gpt_neox"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["PreskipGPTNeoXForCausalLM"]
    scope: dict = {}
    exec((tmp_path / "out" / "modeling_preskip.py").read_text(), scope)
    for reference in config["auto_map"].values():
        assert reference.split(".")[0] == "modeling_preskip"
        assert reference.split(".")[1] in scope


def test_saved_again_it_keeps_its_stub(tmp_path, monkeypatch):
    bake(adapted(), tmp_path / "out")
    family = architecture("llama")
    for kind in (family.config, family.model, family.causal_lm):
        monkeypatch.setattr(kind, "_auto_class", None)
    # As transformers does where the stub has brought the classes.
    family.config.register_for_auto_class()
    family.causal_lm.register_for_auto_class(auto_class=AutoModelForCausalLM)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    for name in ("config.json", "modeling_preskip.py"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert [path.name for path in (tmp_path / "again").glob("*.py")] == ["modeling_preskip.py"]


def test_lora_on_a_baked_model_and_merging_it(tmp_path):
    bake(adapted(), tmp_path / "out")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = logits(baked.eval())
    tuned = get_peft_model(baked, LoraConfig(r=2, init_lora_weights=False))  # default targets of the base type
    assert zoo.difference(logits(tuned.eval()), before) > 1e-4
    wanted = logits(tuned)
    merged = tuned.merge_and_unload()
    assert zoo.difference(logits(merged), wanted) < 1e-5


def test_a_second_branch_on_a_baked_model_is_refused(tmp_path):
    bake(adapted(), tmp_path / "out")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = {key: value.clone() for key, value in baked.state_dict().items()}
    with pytest.raises(PreskipError, match="has its own branch"):
        get_peft_model(baked, PreskipConfig())
    assert state.keys() == baked.state_dict().keys()


def test_a_baked_model_trains_on(tmp_path):
    bake(adapted(), tmp_path / "out")
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out").train()
    ids = zoo.inputs("llama")["input_ids"]
    optimizer = torch.optim.SGD(baked.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = baked(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_a_baked_model_loads_quantised(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = get_peft_model(zoo.build("llama", hidden_size=64, head_dim=16), PreskipConfig())
    zoo.randomise(model, std=0.02)
    bake(model, tmp_path / "out")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=settings).eval()
    attention = quantised.model.layers[0].self_attn
    assert type(attention.q_proj).__name__ == "Linear4bit"
    assert type(attention.preskip.up) is torch.nn.Linear  # the branch stays as it was trained
    assert torch.equal(attention.preskip.up.weight, model.state_dict()[_key("up")])
    exact = logits(model.eval())
    correlation = torch.corrcoef(torch.stack([logits(quantised).flatten(), exact.flatten()]))[0, 1].item()
    assert 0.9 < correlation < 1


def _key(part: str) -> str:
    return f"base_model.model.model.layers.0.self_attn.preskip.{part}.default.weight"


def test_the_card_says_what_it_is(tmp_path):
    bake(adapted(expansion=0.5), tmp_path / "out", base_name="someone/their-llama")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: someone/their-llama" in card
    assert "expansion 0.5" in card
    assert "licence" in card


def refused(model, out: Path, words: str) -> None:
    with pytest.raises(PreskipError, match=words) as caught:
        bake(model, out)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_baked_is_refused_in_one_line(tmp_path):
    out = tmp_path / "out"
    refused(zoo.build("llama"), out, "no Preskip adapter")
    refused(get_peft_model(zoo.build("bloom"), PreskipConfig()), out, "a bloom model cannot be baked")
    refused(get_peft_model(zoo.build("llama"), LoraConfig(target_modules=["q_proj"])), out, "no Preskip adapter")
    below = adapted()
    get_peft_model(below.get_base_model(), LoraConfig(target_modules=["q_proj"]))
    refused(below, out, "merge or unload it first")
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "mine").write_text("kept")
    refused(adapted(), out, "exists already")
    assert (out / "mine").read_text() == "kept"


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    model = adapted()

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(architecture("llama").causal_lm, "save_pretrained", fails)
    with pytest.raises(PreskipError, match="no space left"):
        bake(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_shard_is_an_error(tmp_path):
    bake(adapted(), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    from preskip.assets import load_model

    with pytest.raises(PreskipError) as caught:
        load_model(str(tmp_path / "out"), dtype="float32")
    assert "\n" not in str(caught.value)


def test_auto_model_and_config_read_it(tmp_path):
    bake(adapted(), tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").preskip_expansion == 1.25
    assert AutoModel.from_pretrained(tmp_path / "out").layers[1].self_attn.preskip.d == zoo.WIDTH
    assert not isinstance(AutoModel.from_pretrained(tmp_path / "out"), PeftModel)
