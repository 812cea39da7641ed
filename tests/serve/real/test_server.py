"""`preskip serve` with the real vLLM: many clients at once, several adapters, and every way that it may end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import psutil
import pytest
import torch

from ports import free_port
from real_vllm import LONG, PROMPTS, save_several
from served import first_document

NEW = 24
MODELS = ["zeal", "ash", "moss"]


def command(folder, port, *more):
    return [sys.executable, "-m", "preskip", "serve", folder, "--engine", "vllm", "--port", str(port), *more]


def begin(arguments, **options):
    """Start it as from a terminal: where this runs in a shell's background, Ctrl-C is ignored."""
    return subprocess.Popen(
        arguments, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options
    )


@contextmanager
def serving(folder, port, *more):
    """`preskip serve` as a process, and what it printed once it answered; killed if a test fails."""
    served = begin(command(folder, port, "--json", *more), stdout=subprocess.PIPE)
    try:
        yield served, json.loads(first_document(served))
    finally:
        if served.poll() is None:
            served.terminate()
            served.wait(300)


def gone(process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


async def tokens_of(client, model, prompt, leaves_after=None):
    """The token ids of one streamed answer; a client may leave in the middle."""
    tokens = []
    answer = await client.completions.create(
        model=model, prompt=prompt, max_tokens=NEW, temperature=0, stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )  # fmt: skip
    async for chunk in answer:
        tokens += chunk.choices[0].model_extra.get("token_ids") or []
        if leaves_after is not None and len(tokens) >= leaves_after:
            await answer.close()
            break
    return tokens


def at_once(url, asked):
    """The answers to (model, prompt, when to leave), all asked for at once."""
    from openai import AsyncOpenAI

    async def ask():
        client = AsyncOpenAI(base_url=url, api_key="none", timeout=900)
        return await asyncio.gather(*(tokens_of(client, *one) for one in asked))

    return asyncio.run(ask())


def wanted(folder, prompts, adapters=()):
    """What transformers answers, each prompt by itself, with each of the adapters if there are several."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    every = [(prompt, {"adapter_names": [name]}) for prompt in prompts for name in adapters]
    every = every or [(prompt, {}) for prompt in prompts]
    return [model.generate(torch.tensor([p]), **settings, **picks)[0, len(p) :].tolist() for p, picks in every]


def ask_long(url, prompt):
    """Asks for a long answer in a thread; an event that it has begun, one that it has ended, and the thread."""
    from openai import OpenAI

    begun, ended = threading.Event(), threading.Event()
    client = OpenAI(base_url=url, api_key="none", timeout=900, max_retries=0)

    def ask():
        try:
            for _ in client.completions.create(
                model="tiny", prompt=prompt, max_tokens=440, stream=True, extra_body={"ignore_eos": True}
            ):
                begun.set()
        except Exception as error:
            print(f"\nthe request ended with {type(error).__name__}")
        begun.set()
        ended.set()

    thread = threading.Thread(target=ask)
    thread.start()
    return begun, ended, thread


def test_the_server_under_load_cancelled_restarted_and_killed(checkpoints):
    """16 streams at once, one of them cancelled, give what transformers gives; so does a server started again."""
    from openai import OpenAI

    folder, _ = checkpoints("llama")
    prompts = [[*PROMPTS[i % 4][: 4 + i], 2 + i] for i in range(16)]
    expected = wanted(folder, prompts)
    asked = [("tiny", prompt, 4 if index == 3 else None) for index, prompt in enumerate(prompts)]
    port = free_port()

    def equal(url):
        answers = at_once(url, asked)
        return sum(a == b for index, (a, b) in enumerate(zip(answers, expected, strict=True)) if index != 3)

    with serving(folder, port, "--name", "tiny") as (served, facts):
        children = psutil.Process(served.pid).children(recursive=True)
        assert equal(facts["url"]) == 15
        # SIGTERM while it streams.
        begun, ended, thread = ask_long(facts["url"], prompts[0])
        assert begun.wait(300)
        served.send_signal(signal.SIGTERM)
        assert served.wait(300) == 143
        assert ended.wait(300)
        thread.join()
        assert all(map(gone, children))

    with serving(folder, port, "--name", "tiny") as (served, facts):
        assert equal(facts["url"]) == 15
        client = OpenAI(base_url=facts["url"], api_key="none", timeout=900, max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny"]
        # The engine's process is killed while it answers: the request ends, the server ends, nothing is left.
        children = psutil.Process(served.pid).children(recursive=True)
        engine = next(child for child in children if "EngineCore" in " ".join([child.name(), *child.cmdline()]))
        begun, ended, thread = ask_long(facts["url"], prompts[0])
        assert begun.wait(300)
        engine.kill()
        assert served.wait(300) == 1
        assert ended.wait(300)
        thread.join()
        assert all(map(gone, children))
    print("\n15 of 15 streams equal, twice; the 16th was cancelled; SIGTERM and SIGKILL of the engine ended all")


def test_several_adapters_answer_side_by_side(tmp_path):
    """16 requests at once, each for one of three adapters or the base; prompts share what the prefix cache holds."""
    folder = save_several(tmp_path, MODELS)
    prompts = [LONG[0], LONG[2], PROMPTS[0], PROMPTS[2]]
    names = [*MODELS, "__base__"]
    asked = [(name, prompt, None) for prompt in prompts for name in names]
    expected = wanted(folder, prompts, names)
    with serving(folder, free_port()) as (served, facts):
        assert facts["models"] == names
        for turn in ("first", "from the prefix cache"):
            answers = at_once(facts["url"], asked)
            assert answers == expected, turn
        served.send_signal(signal.SIGINT)
        assert served.wait(300) == 130
    assert len({tuple(answer) for answer in answers}) == 16
    print("\n3 adapters and the base: 16 of 16 streams at once equal to transformers' own, twice")


def test_ctrl_c_while_it_starts_leaves_nothing(checkpoints):
    served = begin(command(checkpoints("llama")[0], free_port()), stderr=subprocess.PIPE)
    for line in served.stderr:
        if "starting vllm" in line:
            break
    me = psutil.Process(served.pid)
    while not me.children(recursive=True):  # what is waited for is the engine's process
        os.sched_yield()
    children = me.children(recursive=True)
    served.send_signal(signal.SIGINT)
    rest = served.stderr.read()
    assert served.wait(300) == 130
    assert "Traceback" not in rest
    assert all(map(gone, children))


@pytest.mark.parametrize("case", ["truncated", "no architecture of ours", "too long"])
def test_what_cannot_be_served_ends_in_one_line(case, checkpoints, tmp_path):
    """The last one is refused by vLLM itself: the line is from its log."""
    more = []
    if case == "truncated":
        folder = shutil.copytree(checkpoints("llama")[0], tmp_path / "broken")
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        words = "is damaged or cut short"
    elif case == "no architecture of ours":
        folder, words = checkpoints("llama")[1], "is a llama model, which has no branch"
    else:
        folder, more, words = checkpoints("llama")[0], ["--engine-args", "--max-model-len 4096"], "max_model_len"
    done = subprocess.run(command(folder, free_port(), *more), capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in line
