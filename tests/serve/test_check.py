"""A checkpoint's files before they are served, and the judgement of an engine's scores."""

from __future__ import annotations

import json
import sys

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from preskip import PreskipError
from preskip.architecture import architecture
from preskip.serve.check import check, compare, engine_scores, transformers_scores
from preskip.serve.checkpoint import examine, without_branch
from zoo import FAMILIES

PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("checkpoint") / "baked"
    made = architecture("qwen3").causal_lm(architecture("qwen3").config(**FAMILIES["qwen3"].settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    made.save_pretrained(place, max_shard_size="40KB")
    return place


def test_sizes_are_counted_from_the_files_heads(folder):
    facts = examine(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    named = dict(model.named_parameters())
    assert facts.weight_bytes == sum(p.numel() * 4 for p in named.values())
    assert facts.weight_bytes_in("bfloat16") == facts.weight_bytes / 2
    assert facts.weight_bytes_in("float32") == facts.weight_bytes
    assert facts.branch_bytes == sum(p.numel() * 4 for name, p in named.items() if ".preskip." in name)
    assert facts.weight_ratio == pytest.approx(facts.weight_bytes / (facts.weight_bytes - facts.branch_bytes))
    cache = model(torch.arange(8, 12)[None], use_cache=True).past_key_values
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert facts.cache_bytes == facts.cache_bytes_in("float32") == stored / 4
    assert facts.cache_bytes_in("bfloat16") == stored / 8


@pytest.mark.parametrize("case", ["cut", "shard", "branch", "base", "config"])
def test_a_damaged_checkpoint_is_refused_in_one_line(case, folder, tmp_path):
    import shutil

    broken = shutil.copytree(folder, tmp_path / "broken")
    config, shards = broken / "config.json", sorted(broken.glob("*.safetensors"))
    if case == "cut":
        shards[1].write_bytes(shards[1].read_bytes()[:-7])
        words = "is damaged or cut short"
    elif case == "shard":
        shards[1].unlink()
        words = "does not exist: the checkpoint is incomplete"
    elif case == "branch":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3, "layer_types": None}))
        words = "holds 2 of 3 branches"
    elif case == "base":
        broken, words = without_branch(folder, tmp_path / "base"), "is a qwen3 model without a branch"
    else:
        config.write_text("{")
        words = "cannot be read"
    with pytest.raises(PreskipError, match=words) as error:
        examine(broken)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_the_base_of_a_checkpoint_is_the_same_model_without_branches(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for module in model.modules():
        for handle in getattr(module, "hook_handles", ()):
            handle.remove()
    base = AutoModelForCausalLM.from_pretrained(without_branch(folder, tmp_path / "base"), dtype=torch.float32)
    assert type(base).__name__ == "Qwen3ForCausalLM"
    ids = torch.arange(8, 20)[None]
    assert torch.equal(base(ids).logits, model(ids).logits)


def scores(folder, tmp_path):
    ours = transformers_scores(folder, "float32", PROMPTS)
    return ours, transformers_scores(without_branch(folder, tmp_path / "base"), "float32", PROMPTS)


def moved(result, by):
    return {**result, "logprobs": [[value + by for value in row] for row in result["logprobs"]]}


def test_an_engine_that_ignores_the_branch_fails(folder, tmp_path):
    expected, without = scores(folder, tmp_path)
    judge = {"base": without, "expected": expected, "without": without}
    facts = examine(folder)
    found = compare(facts, "e", "float32", ours=moved(expected, 5e-4), **judge)
    assert found.problem is None
    assert found.largest == pytest.approx(5e-4)
    assert (found.greedy_equal, found.greedy) == (64, 64)
    ignored = compare(facts, "e", "float32", ours=without, **judge)
    assert ignored.problem.startswith("the engine ignores the branch: the largest difference to transformers is ")
    assert ignored.without_largest == 0
    assert ignored.greedy_equal < 64
    off = compare(facts, "e", "float32", ours=moved(expected, 2e-3), **judge)
    assert off.problem == "the largest difference to transformers is 0.002, more than 0.001"
    nan = compare(facts, "e", "float32", ours=moved(expected, float("nan")), **judge)
    assert "is nan" in nan.problem
    nothing = compare(facts, "e", "float32", ours=expected, base=expected, expected=expected, without=expected)
    assert "changes too little for this check to see it" in nothing.problem
    fewer = {"ours": {**expected, "blocks": 9}, **judge, "base": {**without, "blocks": 10}}
    blocks = compare(facts, "e", "float32", **fewer)
    assert blocks.problem == "the K/V cache has 9 blocks, the base's in the same memory 10"
    # On a GPU the engine gives the cache what the weights leave.
    assert compare(facts, "e", "float32", **fewer, is_same_memory=False).problem is None


def test_16_bits_are_held_against_the_bases_own_difference(folder, tmp_path):
    expected, without = scores(folder, tmp_path)
    judge = {"base": moved(without, 0.01), "expected": expected, "without": without}
    facts = examine(folder)
    assert compare(facts, "e", "bfloat16", ours=moved(expected, 0.014), **judge).problem is None
    worse = compare(facts, "e", "bfloat16", ours=moved(expected, 0.016), **judge)
    assert worse.problem == "the mean difference to transformers is 0.016, more than 0.015"
    # A model that by itself moves twice as much as the base between 16 bits and float32 is allowed twice as much.
    for moves, problem in ((2.0, None), (0.5, worse.problem)):
        found = compare(facts, "e", "bfloat16", ours=moved(expected, 0.016), rounding=lambda m=moves: m, **judge)
        assert (found.problem, found.sensitivity) == (problem, moves)
    assert "ignores" in compare(facts, "e", "bfloat16", ours=without, rounding=lambda: 2.0, **judge).problem


def test_an_engine_that_dies_says_why_and_leaves_no_process(folder, tmp_path, monkeypatch):
    """vLLM's processes outlive the one that is waited for, if nobody ends them."""
    engine = tmp_path / "python"
    engine.write_text(
        f"#!/bin/sh\nsleep 600 & echo $! > {tmp_path}/child\n"
        f"cp $3 {tmp_path}/asked\necho 'ValueError: no heads of 8'\nexit 3\n"
    )
    engine.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(engine))
    with pytest.raises(PreskipError, match=r"vllm does not serve .*: ValueError: no heads of 8"):
        engine_scores("vllm", folder, "float32", PROMPTS, {"enforce_eager": True})
    child = int((tmp_path / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    asked = json.loads((tmp_path / "asked").read_text())
    assert (asked["prompts"], asked["options"], asked["loras"]) == (PROMPTS, {"enforce_eager": True}, [])


def test_the_whole_check_with_transformers_as_the_engine(folder):
    found = check(examine(folder), "transformers", "float32", device="cpu", note=lambda words: None)
    assert (found.problem, found.largest, found.blocks) == (None, 0.0, None)
    assert found.without_mean > 0.1
    assert json.loads(json.dumps(found.to_json()))["cache_bytes"] == examine(folder).cache_bytes
