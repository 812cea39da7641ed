"""vLLM against transformers: every prompt token's log probability, greedy tokens, K/V blocks."""

from __future__ import annotations

import json

import pytest
import torch

from preskip.serve.check import check
from preskip.serve.checkpoint import examine, without_branch
from real_vllm import CASES, COMPILED, EAGER, LONG, PARALLEL, judged, save_int8, save_several


def all_equal(found):
    assert found.problem is None
    assert found.greedy_equal == found.greedy


@pytest.mark.parametrize("case", CASES)
def test_float32_is_as_in_transformers(checkpoints, case):
    all_equal(judged(case, checkpoints(case), EAGER))


@pytest.mark.parametrize("case", CASES)
def test_compiled_with_chunked_prefill_and_prefix_caching_too(checkpoints, case):
    all_equal(judged(case, checkpoints(case), COMPILED, prompts=LONG))


@pytest.mark.parametrize("case", CASES)
def test_tensor_parallel_too(checkpoints, case, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # one core each, also where all memory is one node
    all_equal(judged(case, checkpoints(case), PARALLEL))


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_near_as_the_base(checkpoints, case):
    found = judged(case, checkpoints(case), EAGER, dtype="bfloat16")
    assert found.problem is None
    assert found.blocks == found.base_blocks


def test_int8_branches(checkpoints, tmp_path):
    folder, base = checkpoints("llama")
    all_equal(judged("llama, int8 branch", (save_int8(folder, tmp_path / "int8"), base), EAGER))


def test_the_check_of_several_adapters_scores_each_of_them(tmp_path):
    folder = save_several(tmp_path, ["zeal", "ash", "moss"])
    found = check(examine(folder), "vllm", "float32", device="cpu", note=lambda words: None)
    print(f"\n3 adapters, checked: {json.dumps(found.to_json())}", flush=True)
    all_equal(found)
    assert found.greedy == 3 * 4 * 32


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The embedded model with random branches, baked in a dtype, and its base."""
    from peft import get_peft_model

    from preskip import PreskipConfig, assets, bake

    root, made = tmp_path_factory.mktemp("embedded"), {}

    def get(dtype):
        if dtype not in made:
            torch.manual_seed(0)
            settings = PreskipConfig(init_weights="paper", init_std=0.02, skip_init_std=0.01)
            model = get_peft_model(assets.load_model("smollm2", getattr(torch, dtype)), settings).eval()
            tokenizer = assets.load_tokenizer("smollm2")
            folder = bake(model, root / dtype, tokenizer=tokenizer, base_name="smollm2")
            made[dtype] = folder, without_branch(folder, root / f"{dtype}-base")
        return made[dtype]

    return get


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("float32", EAGER), ("float32", COMPILED), ("bfloat16", EAGER)],
    ids=["float32", "compiled", "bfloat16"],
)
def test_the_embedded_model(embedded, dtype, options):
    """Not tensor parallel: its 9 heads do not divide over 2 processes."""
    prompts = {"prompts": LONG} if options is COMPILED else {}
    found = judged("SmolLM2-135M-Instruct", embedded(dtype), options, dtype=dtype, **prompts)
    assert found.problem is None
    if dtype == "float32":
        assert found.greedy_equal == found.greedy
