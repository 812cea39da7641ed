"""`preskip bake` through the real command: from a run, from a lone adapter, and what it refuses."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from commands import PROBE, make_run, preskip
from preskip import PreskipConfig
from preskip.architecture.several import picked
from preskip.cli.bake import bake_saved
from preskip.errors import PreskipError
from preskip.report.words.verdicts import difference_text, interval_text
from tiny_model import save_tiny_llama, write_corpus
from tiny_text import tiny_tokenizer
from zoo import randomise


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("place"), "--seeds", "1,2")


def adapter(place, arm="preskip"):
    return place / "run" / "arms" / arm / "seed-2" / "adapter"


def test_an_adapter_of_a_run(place, tmp_path, capsys):
    assert preskip("bake", adapter(place), tmp_path / "out", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model_type"], facts["logits_difference"], facts["dtype"]) == ("preskip_llama", 0.0, "float32")
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    wanted = PeftModel.from_pretrained(base, adapter(place)).eval()
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(baked(ids).logits, wanted(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the people").input_ids
    results = json.loads((place / "run" / "results.json").read_text())
    value = results["arms"]["preskip"]["metrics"]["corpus"]["bits_per_byte"]
    assert (tmp_path / "out" / "depth.png").is_file()
    card = (tmp_path / "out" / "README.md").read_text().replace("\\", "")
    shown = interval_text("bits_per_byte", value)
    assert f"{shown['value']} {shown['interval']}" in card
    difference = next(
        row
        for row in results["comparisons"]
        if (row["arm"], row["reference"], row["set"]) == ("preskip", "none", "corpus")
    )
    shown = difference_text(difference)
    assert f"{shown['value']} {shown['interval']}" in card
    assert "AutoModelForCausalLM.from_pretrained" in card


def test_of_a_run_the_adapter_that_stands_for_it_is_baked(place, tmp_path, capsys):
    assert preskip("bake", place / "run", tmp_path / "out") == 0
    assert f"arm preskip, seed 1; another one is {place}/run/arms/ARM/seed-N/adapter" in capsys.readouterr().err
    wanted = load_file(place / "run/arms/preskip/seed-1/adapter/adapter_model.safetensors")
    branch = "model.layers.0.self_attn.preskip.up.weight"
    baked = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(baked[branch], wanted[f"base_model.model.{branch}"])


def test_serve_says_which_adapter_of_a_run_it_takes(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PRESKIP_CACHE", str(tmp_path))
    preskip("serve", place / "run", "--check", "--engine", "transformers")
    assert f"arm preskip, seed 1; another one is {place}/run/arms/ARM/seed-N/adapter" in capsys.readouterr().err
    (made,) = tmp_path.glob("baked/*/model.safetensors")
    wanted = load_file(place / "run/arms/preskip/seed-1/adapter/adapter_model.safetensors")
    branch = "model.layers.0.self_attn.preskip.up.weight"
    assert torch.equal(load_file(made)[branch], wanted[f"base_model.model.{branch}"])


def test_the_baked_model_is_scored_as_the_adapter_was(place, tmp_path, capsys):
    assert preskip("bake", adapter(place), tmp_path / "out") == 0
    capsys.readouterr()
    scored = ["--corpus", place / "corpus.jsonl", "--context-length", "32", "--dtype", "float32", "--json"]
    assert preskip("eval", tmp_path / "out", *scored) == 0
    baked = json.loads(capsys.readouterr().out)["metrics"]
    assert preskip("eval", place / "model", "--adapter", adapter(place), *scored) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == baked


def test_a_baked_model_can_be_probed_but_not_with_a_second_branch(place, tmp_path, capsys):
    assert preskip("bake", adapter(place), tmp_path / "out") == 0
    options = [*PROBE, "--seeds", "1", "--corpus", place / "corpus.jsonl"]
    assert preskip("probe", tmp_path / "out", *options, "--arms", "none,lora", "--out", tmp_path / "lora") == 0
    capsys.readouterr()
    assert preskip("probe", tmp_path / "out", *options, "--arms", "none,preskip", "--out", tmp_path / "twice") == 1
    assert "has its own branch already" in capsys.readouterr().err


def test_a_lone_adapter_takes_the_base_it_names(place, tmp_path, capsys):
    shutil.copytree(adapter(place), tmp_path / "lone")
    assert preskip("bake", tmp_path / "lone", tmp_path / "out", "--model", place / "model", "--dtype", "bfloat16") == 0
    assert "base weights bfloat16" in capsys.readouterr().err
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert baked.model.embed_tokens.weight.dtype == torch.bfloat16
    assert baked.model.layers[0].self_attn.preskip.up.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("case", ["missing", "lora", "exists", "dtype", "other base", "corrupt", "results", "place"])
def test_what_cannot_be_baked_ends_in_one_line(case, place, tmp_path, capsys):
    source, out, more = adapter(place), tmp_path / "out", []
    if case == "missing":
        source, words = tmp_path / "nothing", "no adapter_config.json"
    elif case == "lora":
        source, words = adapter(place, "lora"), "holds a LORA adapter, which has no branch"
    elif case == "exists":
        out, words = place / "corpus.jsonl", "exists already"
    elif case == "place":
        out, words = place / "corpus.jsonl" / "out", "no folder can be made in"
    elif case == "dtype":
        more, words = ["--dtype", "float64"], "--dtype 'float64' is unknown"
    elif case == "other base":
        save_tiny_llama(tmp_path / "wide", hidden_size=64)
        more, words = ["--model", tmp_path / "wide"], "shape"
    elif case == "results":
        shutil.copytree(place / "run", tmp_path / "run")
        (tmp_path / "run" / "results.json").write_text("{")
        source, words = tmp_path / "run" / "arms" / "preskip" / "seed-2" / "adapter", "results.json is not valid JSON"
    else:
        shutil.copytree(source, tmp_path / "broken")
        file = tmp_path / "broken" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-50])
        source, more, words = tmp_path / "broken", ["--model", place / "model"], "does not fit this model"
    assert preskip("bake", source, out, *more) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error
    assert case == "exists" or not out.exists()


@pytest.mark.parametrize("quantize", [(), ("--quantize", "int8")])
def test_logits_that_are_not_finite_are_no_match(quantize, place, tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    with torch.no_grad():
        base.lm_head.weight.fill_(float("nan"))
    base.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(tmp_path / "broken")
    assert preskip("bake", adapter(place), tmp_path / "out", "--model", tmp_path / "broken", *quantize) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        error == "error: logits in float32 hold NaN or infinity, nothing was kept: the base or the adapter is damaged"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_a_checkpoint_that_was_not_compared_to_the_end_is_not_kept(stop, place, tmp_path, monkeypatch):
    def stopped(live, out, *rest):
        assert out.is_dir()
        raise stop

    monkeypatch.setattr("preskip.cli.bake._difference", stopped)
    with pytest.raises(stop):
        bake_saved({"one": adapter(place)}, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert bake_saved({"one": adapter(place)}, tmp_path / "out", quiet=True)["logits_difference"] == 0.0


def test_several_adapters_side_by_side(place, tmp_path, capsys):
    arm = place / "run" / "arms" / "preskip"
    given = [f"{name}={arm / f'seed-{seed}' / 'adapter'}" for seed, name in ((1, "a"), (2, "b"))]
    assert preskip("bake", *given, tmp_path / "out", "--base", place / "model", "--json") == 0
    assert json.loads(capsys.readouterr().out)["logits_difference"] == 0.0
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.arange(20)[None].repeat(2, 1)
    with torch.no_grad():
        mixed = baked(ids, adapter_names=["b", "a"]).logits
        for row, seed in enumerate((2, 1)):
            base = AutoModelForCausalLM.from_pretrained(place / "model")
            wanted = PeftModel.from_pretrained(base, arm / f"seed-{seed}" / "adapter").eval()(ids[:1]).logits[0]
            assert (mixed[row] - wanted).abs().max() < 1e-5
    with picked(baked, ["a"]), pytest.raises(PreskipError, match="another call with adapter_names has not ended"):
        baked(ids, adapter_names=["b", "a"])
    unnamed = [text.partition("=")[2] for text in given]
    assert preskip("bake", *unnamed, tmp_path / "twice") == 1
    assert "two adapters are called 'adapter': give them as NAME=FOLDER" in capsys.readouterr().err
    assert preskip("bake", given[0]) == 1


def test_a_model_of_few_positions_is_baked_and_an_int8_one_has_all_its_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PRESKIP_CACHE", str(tmp_path / "cache"))
    sizes = {"vocab_size": 400, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "model")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), PreskipConfig())
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    write_corpus(tmp_path / "corpus.jsonl")
    parameters = []
    for name, options in (("plain", []), ("packed", ["--quantize", "int8"])):
        assert preskip("bake", tmp_path / "adapter", tmp_path / name, "--model", tmp_path / "model", *options) == 0
        scored = ["--corpus", tmp_path / "corpus.jsonl", "--limit", "3", "--out", tmp_path / f"{name}-scores"]
        assert preskip("eval", tmp_path / name, *scored, "--dtype", "float32") == 0
        found = json.loads((tmp_path / f"{name}-scores" / "results.json").read_text())
        parameters.append(found["parameters"])
    assert parameters[0] == parameters[1] > 0
    capsys.readouterr()
    assert preskip("serve", tmp_path / "plain", "--check", "--engine", "transformers") == 0
