"""`preskip serve` through the real command, with a stand-in for the engine; the real one is `make test-serve`."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model

import preskip.cli.serve as command
from commands import make_run, preskip
from ports import free_port
from preskip import PreskipConfig
from preskip.serve import server
from preskip.serve.checkpoint import examine
from tiny_model import save_tiny_llama, tiny_llama
from zoo import randomise


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A base and an adapter of it, and a cache of its own."""
    monkeypatch.setenv("PRESKIP_CACHE", str(tmp_path / "cache"))
    save_tiny_llama(tmp_path / "model")
    model = get_peft_model(tiny_llama(), PreskipConfig())
    randomise(model)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "model")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path


def test_check_of_an_adapter_bakes_it_once(place, capsys, monkeypatch):
    assert preskip("serve", place / "adapter", "--check", "--engine", "transformers", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["problem"], found["largest"], found["engine"]) == (None, 0.0, "transformers")
    (baked,) = (place / "cache" / "baked").iterdir()
    assert json.loads((baked / "config.json").read_text())["model_type"] == "preskip_llama"
    before = baked.stat().st_mtime_ns
    assert preskip("serve", place / "adapter", "--check", "--engine", "transformers") == 0
    assert "passed: transformers loads the branch, which changes what comes out" in capsys.readouterr().out
    assert [folder.stat().st_mtime_ns for folder in (place / "cache" / "baked").iterdir()] == [before]
    # One that was cut short, or cleaned up in part, is baked again.
    for damage in (lambda: (baked / "model.safetensors").write_bytes(b"cut"), (baked / "config.json").unlink):
        damage()
        assert preskip("serve", place / "adapter", "--check", "--engine", "transformers") == 0
        assert examine(baked).weight_ratio > 1
    # Another adapter of the same base is another checkpoint.
    weights = place / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert preskip("serve", place / "adapter", "--check", "--engine", "transformers") == 0
    assert len(list((place / "cache" / "baked").iterdir())) == 2


@pytest.mark.parametrize("case", ["tokenizer", "template", "generation", "base weights", "gguf", "nothing"])
def test_a_bake_is_as_old_as_what_it_was_made_of(case, place, monkeypatch):
    base = place / "model"
    if case == "gguf":
        base = place / "model.gguf"
        base.write_bytes(b"GGUF")
    (place / "adapter" / "tokenizer.json").write_text("{}")
    before = command._key(place / "adapter", str(base), "float32")
    if case == "tokenizer":
        (place / "adapter" / "tokenizer.json").write_text('{"added_tokens": []}')
    elif case == "template":
        (place / "model" / "chat_template.jinja").write_text("{{ messages }}")
    elif case == "generation":
        (place / "model" / "generation_config.json").write_text('{"temperature": 0.5}')
    elif case == "base weights":
        os.utime(place / "model" / "model.safetensors", ns=(1, 1))
    elif case == "gguf":
        base.write_bytes(b"GGUF more")
    after = command._key(place / "adapter", str(base), "float32")
    assert (after == before) is (case == "nothing")


def test_the_base_of_a_run_is_looked_up_where_it_was_started(place, monkeypatch, capsys):
    """Its weights are part of the key wherever the command is started."""
    make_run(place)
    config = json.loads((place / "run" / "run.json").read_text())
    config["config"]["model"], config["directory"] = "model", str(place)
    (place / "run" / "run.json").write_text(json.dumps(config))
    keys = []
    monkeypatch.setattr(command, "_key", lambda adapter, *of: keys.append(of) or "key")
    assert preskip("serve", place / "run", "--check", "--engine", "transformers") == 0
    assert keys == [(str(place / "model"), "float32", None)]


def test_other_adapters_in_the_folder_are_named(place, capsys):
    """One whose name begins as the names of an adapter's files, too."""
    shutil.copytree(place / "adapter", place / "second")
    for name in ("adapter_2", "second"):
        shutil.copytree(place / "second", place / "adapter" / name)
    assert preskip("serve", place / "adapter", "--check", "--engine", "transformers") == 0
    assert "adapter also holds adapter_2, second: for another give its folder" in capsys.readouterr().err


def test_the_exit_code_says_that_the_branch_is_ignored(place, capsys, monkeypatch):
    from preskip.serve import check

    def ignoring(engine, folder, dtype, prompts, options, adapters=()):
        from preskip.serve.checkpoint import without_branch

        is_base = json.loads((folder / "config.json").read_text())["model_type"] == "llama"
        return check.transformers_scores(folder if is_base else without_branch(folder, place / "b"), dtype, prompts)

    monkeypatch.setattr(check, "engine_scores", ignoring)
    assert preskip("serve", place / "adapter", "--check", "--engine", "transformers") == 1
    assert "failed: the engine ignores the branch" in " ".join(capsys.readouterr().out.split())


def test_serving_prints_how_to_ask_and_says_when_the_engine_is_gone(place, capsys, monkeypatch):
    """The stand-in answers one health check and ends, as an engine does whose process was killed."""
    code = (
        "import http.server, sys\n"
        "class A(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        "print('EngineDeadError: the engine core died', flush=True)\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), A).handle_request()\n"
    )
    port, asked = free_port(), {}

    def stand_in(engine, checkpoint, **options):
        asked.update(options, engine=engine)
        return [sys.executable, "-c", code, str(options["port"])]

    monkeypatch.setattr(server, "command", stand_in)
    monkeypatch.setattr(command, "serving_problem", lambda: None)
    more = ["--name", "mine", "--engine-args", "--max-model-len 64"]
    assert preskip("serve", place / "adapter", "--port", port, *more) == 1
    out, err = capsys.readouterr()
    assert out, err
    assert f"curl http://127.0.0.1:{port}/v1/completions" in out
    assert "client.completions.create(model='mine'" in out
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: the server ended by itself (exit code 0): EngineDeadError: the engine core died")
    assert (asked["engine"], asked["name"], asked["dtype"]) == ("vllm", "mine", "float32")
    assert asked["more"] == ["--max-model-len", "64"]


def test_several_adapters_are_models_of_one_server(place, capsys, monkeypatch):
    """vLLM is told of each as a LoRA that picks its branch; the files are gone with the server."""
    assert preskip("bake", f"zeal={place / 'adapter'}", f"ash={place / 'adapter'}", place / "both") == 0
    asked = []

    def stand_in(engine, checkpoint, **options):
        asked.extend(options["more"])
        return [sys.executable, "-c", "print('EngineDeadError: dead')"]

    monkeypatch.setattr(server, "command", stand_in)
    monkeypatch.setattr(server, "is_healthy", lambda url: True)
    monkeypatch.setattr(command, "serving_problem", lambda: None)
    more = ["--port", free_port(), "--json", "--engine-args", "--max-model-len 64"]
    capsys.readouterr()
    assert preskip("serve", place / "adapter", "--check", "--engine", "transformers", "--json") == 0
    alone = json.loads(capsys.readouterr().out)["tokens"]
    assert preskip("serve", place / "both", *more) == 1
    out, err = capsys.readouterr()
    shown = json.loads(out)  # that it died afterwards is no second document
    assert err.startswith("error: the server ended by itself (exit code 0): EngineDeadError: dead")
    assert (shown["model"], shown["models"]) == ("zeal", ["zeal", "ash", "__base__"])
    loras = [json.loads(text) for text in asked if text.startswith("{")]
    assert [one["name"] for one in loras] == ["zeal", "ash"]
    assert asked[-2:] == ["--max-model-len", "64"]
    assert not any(Path(one["path"]).exists() for one in loras)
    assert preskip("serve", place / "both", "--check", "--engine", "transformers", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["largest"], found["tokens"]) == (0.0, 2 * alone)


def test_memory_is_checked_in_the_dtype_that_is_served(place, capsys, monkeypatch):
    """A float32 checkpoint that would fit in bfloat16 only."""
    assert preskip("bake", place / "adapter", place / "baked") == 0
    size = (place / "baked" / "model.safetensors").stat().st_size
    free = SimpleNamespace(available=size * 3 // 4)
    monkeypatch.setattr(server, "SPARE", 0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    # With a GPU at hand, too: what the check has computed by transformers stays on the CPU.
    monkeypatch.setattr("preskip.runs.environment.resolve_device", lambda name: "cuda")
    more = ["--check", "--engine", "transformers"]
    assert preskip("serve", place / "baked", *more) == 1
    assert "of cpu memory are free: free some, or give --dtype bfloat16" in " ".join(capsys.readouterr().err.split())
    assert preskip("serve", place / "baked", *more, "--dtype", "bfloat16") == 0


def test_bytes_are_those_of_the_dtype_that_is_served(place, capsys):
    """Of a float32 checkpoint: keys and values of 2 layers, 2 heads of width 8."""
    assert preskip("bake", place / "adapter", place / "baked") == 0
    facts = replace(examine(place / "baked"), weight_bytes=8_000_000, branch_bytes=2_000_000)
    for dtype, megabytes, width in (("float32", 8, 4), ("bfloat16", 4, 2)):
        assert command._described(facts, "transformers", dtype) == (
            f"preskip_llama, {dtype}: {megabytes} MB of weights, 1.333 times the base's; {2 * 2 * 2 * 8 * width} bytes "
            "of keys and values per token, as many as the base's"
        )
    capsys.readouterr()
    more = ["--engine", "transformers", "--dtype", "bfloat16", "--json"]
    assert preskip("serve", place / "baked", "--check", *more) == 0
    assert json.loads(capsys.readouterr().out)["cache_bytes"] == 2 * 2 * 2 * 8 * 2


def test_options_that_a_checkpoint_leaves_no_place_for_are_refused(place, capsys, monkeypatch):
    assert preskip("bake", f"zeal={place / 'adapter'}", f"ash={place / 'adapter'}", place / "both") == 0
    for option, words in (
        (["--name", "mine"], "--name is not possible with --check, which starts no server: leave it out"),
        (["--model", place / "model"], "--model is for an adapter's base, and"),
        (["--trust-remote-code"], "--trust-remote-code is for an adapter's base, and"),
    ):
        capsys.readouterr()
        assert preskip("serve", place / "both", "--check", "--engine", "transformers", *option) == 1
        assert words in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    assert preskip("serve", place / "both", "--engine", "transformers", "--port", free_port(), "--name", "mine") == 1
    assert "answers as zeal, ash, __base__, by its adapters: leave it out" in " ".join(capsys.readouterr().err.split())


def test_several_adapters_are_not_packed_into_one_row(place, capsys, monkeypatch):
    """Continuous batching runs the bare model, so every name would answer as the first adapter."""
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    assert preskip("bake", f"zeal={place / 'adapter'}", f"ash={place / 'adapter'}", place / "both") == 0
    more = ["--engine", "transformers", "--port", free_port(), "--engine-args", "--continuous-batching"]
    capsys.readouterr()
    monkeypatch.setattr(server, "running", lambda *arguments: pytest.fail("the server was started"))
    assert preskip("serve", place / "both", *more) == 1
    assert "--continuous-batching answers all of zeal, ash as zeal: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "mend"),
    [
        ("--port 9000", "--port is not possible: give --port to preskip serve itself"),
        ("--host=0.0.0.0", "--host is not possible: give --host to preskip serve itself"),
        ("--dtype bfloat16", "--dtype is not possible: give --dtype to preskip serve itself"),
        ("--served_model_name=mine", "--served-model-name is not possible: give --name to preskip serve itself"),
        ("--ssl_keyfile key.pem", "--ssl-keyfile is not possible: preskip serve listens on --host and --port by HTTP"),
    ],
)
def test_the_engine_gets_no_other_address_dtype_or_name(argument, mend, place, capsys):
    """The wait would ask the old address for ever; what was checked would be of another dtype or name."""
    assert preskip("serve", place / "adapter", "--engine-args", argument) == 1
    assert f"error: --engine-args {mend}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--foo 'unbalanced", '--engine-args "--foo \'unbalanced" cannot be read: no closing quotation'),
        ("--lora-modules x=damaged", "damaged/adapter_config.json is damaged, it holds no configuration"),
        ("--lora-modules x=cut", "cut/adapter_config.json cannot be read"),
    ],
)
def test_engine_arguments_that_cannot_be_read_end_in_one_line(arguments, words, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    for name, content in (("damaged", "[]"), ("cut", "{")):
        (place / name).mkdir()
        (place / name / "adapter_config.json").write_text(content)
    assert preskip("serve", place / "adapter", "--engine-args", arguments) == 1
    assert words in " ".join(capsys.readouterr().err.split())
    assert preskip("serve", place / "damaged", "--check", "--engine", "transformers") == 1
    assert "holds no configuration" in " ".join(capsys.readouterr().err.split())


def test_an_argument_longer_than_a_path_reaches_the_engine(place, monkeypatch):
    long = json.dumps({"a": "x" * 5000})
    command._refuse_as_lora(["--hf-overrides", long])
    command._refuse_as_lora([f"--hf-overrides={long}", "a\0b"])


def test_config_and_weights_that_disagree_end_the_check_in_one_line(place, capsys):
    assert preskip("bake", place / "adapter", place / "baked") == 0
    config = json.loads((place / "baked" / "config.json").read_text())
    for changes in ({"preskip_expansion": 2.0}, {"preskip_layers": [0]}):
        (place / "baked" / "config.json").write_text(json.dumps(config | changes))
        capsys.readouterr()
        assert preskip("serve", place / "baked", "--check", "--engine", "transformers") == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert "config" in line


def test_the_check_refuses_arguments_that_it_would_not_try(place, capsys):
    more = ["--engine", "transformers", "--engine-args", "--tensor-parallel-size 2 --quantization fp8"]
    assert preskip("serve", place / "adapter", "--check", *more) == 1
    out, err = capsys.readouterr()
    assert "--engine-args is not possible with --check, which runs the engine with its own" in " ".join(err.split())
    assert "passed" not in out


@pytest.mark.parametrize("case", ["port", "gguf", "lora", "cut", "nothing", "vllm", "as lora", "no base"])
def test_what_cannot_be_served_ends_in_one_line(case, place, capsys, monkeypatch):
    monkeypatch.setattr(command, "serving_problem", lambda: "vLLM is not installed: pip install vllm")
    source, more = place / "adapter", ["--engine", "transformers"]
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: True)
    if case == "port":
        taken = socket.socket()
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        more, words = ["--port", taken.getsockname()[1]], "cannot be used"
    elif case == "gguf":
        source, words = place / "model.gguf", "GGUF and llama.cpp know no branch"
        source.write_bytes(b"GGUF")
    elif case == "lora":
        get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(place / "lora")
        source, words = place / "lora", "holds a LORA adapter, which has no branch"
    elif case == "cut":
        assert preskip("bake", place / "adapter", place / "baked") == 0
        weights = place / "baked" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-9])
        source, words = place / "baked", "is damaged or cut short"
    elif case == "as lora":
        more += ["--engine-args", f"--enable-lora --lora-modules a={place / 'adapter'}"]
        words = "is a Preskip adapter, which is no LoRA"
    elif case == "no base":
        shutil.rmtree(place / "model")
        words = f"{place / 'model'}, is not there any more: give it with --model"
    elif case == "nothing":
        source, words = place / "model", "is a llama model, which has no branch"
    else:
        more, words = ["--engine", "vllm"], "vLLM is not installed: pip install vllm"
    assert preskip("serve", source, *more) == 1
    (line,) = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("error: ")]
    assert words in line
    shutil.rmtree(place / "cache", ignore_errors=True)
