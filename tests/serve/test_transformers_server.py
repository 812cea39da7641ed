"""transformers' own server as a process: one checkpoint, several adapters by name, a clean end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from types import SimpleNamespace

import psutil
import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
from ports import free_port
from preskip import PreskipConfig, bake
from preskip.architecture import TYPES, architecture
from preskip.serve.transformers_server import put_classes_on, serve_here_as
from served import first_document
from tiny_model import tiny_llama
from tiny_text import tiny_tokenizer

PROMPT = "the people of the union"


def test_the_classes_are_where_the_server_looks_for_them():
    module = SimpleNamespace()
    put_classes_on(module)
    for base_type in TYPES:
        model = architecture(base_type).causal_lm
        assert getattr(module, model.__name__) is model


@pytest.mark.parametrize("name", ["plain", "a@b", "law@main"])
def test_a_name_with_an_at_is_a_name(name):
    """transformers writes @main behind a name that has no @."""
    refused = pytest.importorskip("fastapi").HTTPException
    loaded = []

    class Manager:
        def __init__(self):
            pass

        def load_model_and_processor(self, model):
            loaded.append(model)
            return None, None

    serve_here_as(Manager, name)
    Manager().load_model_and_processor(name if "@" in name else f"{name}@main")
    assert loaded == [".@main"] * 2
    with pytest.raises(refused, match="there is no model 'other' here"):
        Manager().load_model_and_processor("other@main")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="transformers' own server needs the extra 'serve'")
    folder = tmp_path_factory.mktemp("several")
    model = get_peft_model(tiny_llama(), PreskipConfig(), adapter_name="red")
    model.add_adapter("blue", PreskipConfig())
    for seed, name in enumerate(("red", "blue")):
        model.set_adapter(name)
        zoo.randomise(model, std=0.3, seed=seed)
    return bake(model, folder / "baked", adapter=["red", "blue"], tokenizer=tiny_tokenizer())


def ask(url, model):
    body = {"model": model, "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode(), kind)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())["choices"][0]["text"]


@pytest.mark.slow
def test_each_adapter_answers_under_its_name_and_nothing_is_left(place):
    port = free_port()
    served = subprocess.Popen(
        [sys.executable, "-m", "preskip", "serve", place, "--engine", "transformers", "--port", str(port), "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        check(served, port, place)
    finally:
        if served.poll() is None:
            served.terminate()
            served.wait(120)


def check(served, port, place):
    facts = json.loads(first_document(served))
    assert facts["url"] == f"http://127.0.0.1:{port}/v1"
    child = psutil.Process(facts["pid"])
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    ids = tokenizer(PROMPT, return_tensors="pt")
    texts = {}
    for name in ("red", "blue", "__base__"):
        out = model.generate(**ids, adapter_names=[name], max_new_tokens=6, do_sample=False)
        texts[name] = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert ask(facts["url"], name) == texts[name]
    assert len(set(texts.values())) == 3
    with urllib.request.urlopen(f"{facts['url']}/models", timeout=120) as answer:
        assert [model["id"] for model in json.loads(answer.read())["data"]] == list(texts)
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(facts["url"], "green")
    assert error.value.code == 404
    served.send_signal(signal.SIGTERM)
    assert served.wait(120) == 143
    assert not child.is_running()
