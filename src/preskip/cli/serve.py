"""`preskip serve`: an OpenAI server on a baked checkpoint, an adapter or a run, and the check that its branch runs."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

from cyclopts import Parameter

from preskip.cli.bake import bake_saved
from preskip.cli.base import base_of
from preskip.cli.options import Base, DtypeOfRun, Json, TrustRemoteCode, flag, refuse_unused
from preskip.errors import AfterOutputError, PreskipError
from preskip.model_types import PREFIX
from preskip.progress import quiet_libraries, say, spinner
from preskip.runs.files import read_config
from preskip.runs.weights import ADAPTER_CONFIG, PEFT_TYPE
from preskip.serve.versions import NOT_IN_VLLM, serving_problem
from preskip.version import __version__

if TYPE_CHECKING:
    from preskip.serve.checkpoint import Facts

# Configs, tokenizers, chat templates and a base's own code: what they say is baked, too.
SMALL = (".json", ".jinja", ".model", ".txt", ".py")
# Packs requests into one row of the bare model, which then has the first adapter for all of them.
CONTINUOUS = "--continuous-batching"
# Options of the engines that are options of `preskip serve`.
OWN_OPTIONS = {"--host": "--host", "--port": "--port", "--dtype": "--dtype", "--served-model-name": "--name"}
_NO_SERVER = "is not possible with --check, which starts no server: leave it out"
WITHOUT_SERVER = "transformers' own server needs fastapi and uvicorn: pip install 'preskip[serve]'"


def serve(
    source: Annotated[Path, flag("A baked checkpoint, an adapter, or a run.")],
    *,
    model: Base = None,
    dtype: DtypeOfRun = "auto",
    check: Annotated[bool, flag("Compare the engine with transformers, print the differences, and end.")] = False,
    engine: Annotated[str, flag("auto, vllm or transformers.", choices=("auto", "vllm", "transformers"))] = "auto",
    host: Annotated[str, flag("Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, flag("Port to listen on.", hint=int, least=1, most=65535)] = 8000,
    name: Annotated[Optional[str], flag("Model name that requests give. Default: the source's.")] = None,
    engine_args: Annotated[
        str, Parameter(help="More arguments for the engine, e.g. '--max-model-len 2048'.", allow_leading_hyphen=True)
    ] = "",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Serve a model with its branch through an OpenAI API, with vLLM where it is installed.

    An adapter is baked into the cache first, once. Ctrl-C, SIGTERM or a closed terminal stops the server and all that
    it has started.
    """
    from preskip.rows import BASE
    from preskip.serve.by_token import server_arguments, write_loras
    from preskip.serve.server import check_memory, check_port, command, new_log, reason_in, running, wait

    try:
        more = shlex.split(engine_args)
    except ValueError as error:
        raise PreskipError(f"--engine-args {engine_args!r} cannot be read: {str(error).lower()}") from None
    refuse_unused(serve, locals(), {_NO_SERVER: (not check, ("host", "port", "name"))})
    if check and more:
        raise PreskipError(
            "--engine-args is not possible with --check, which runs the engine with its own: leave one of them out"
        )
    _refuse_as_lora(more)
    _refuse_own_options(more)
    if not check:
        check_port(host, port)
    chosen = _engine(engine, needs_server=not check, quiet=as_json)
    folder = _checkpoint(source, model, dtype, trust_remote_code, quiet=as_json)
    with spinner("reading the checkpoint", quiet=as_json):
        quiet_libraries()
        from preskip.architecture.config import adapter_settings
        from preskip.runs.environment import resolve_device
        from preskip.serve.checkpoint import examine

        facts = examine(folder)
    several = list(adapter_settings(facts.config))
    if several and name is not None:
        raise PreskipError(
            f"--name names one model, and {folder} answers as {', '.join([*several, BASE])}, by its adapters: leave it "
            "out"
        )
    device = resolve_device("auto")
    computed = facts.dtype if dtype == "auto" else dtype
    if chosen == "vllm" and (problem := _not_in_vllm(facts)):
        if engine == "vllm":
            raise PreskipError(f"{problem}: use --engine transformers")
        chosen = _engine("transformers", needs_server=not check, quiet=as_json)
        say(f"falling back to transformers: {problem}", quiet=as_json)
    if several and chosen == "transformers" and CONTINUOUS in more:
        raise PreskipError(
            f"{CONTINUOUS} answers all of {', '.join(several)} as {several[0]}: leave it out, or serve one adapter"
        )
    is_on_cpu = check and chosen == "transformers"  # what the check has computed by transformers stays on the CPU
    check_memory(facts.weight_bytes_in(computed), "cpu" if is_on_cpu else device, chosen, more)
    if check:
        from preskip.cli.serve_check import run_check

        run_check(facts, chosen, computed, device=device, as_json=as_json)
        return
    say(_described(facts, chosen, computed), quiet=as_json)
    models = [*several, BASE] if several else [name or source.resolve().name]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    log = new_log("serve")
    say(f"starting {chosen}, which may take minutes; its log is {log}", quiet=as_json)
    with tempfile.TemporaryDirectory(prefix="preskip-serve-") as loras:
        if several and chosen == "vllm":
            more = [*server_arguments(write_loras(several, facts.branches, Path(loras))), *more]
        place: dict[str, Any] = {"host": host, "port": port, "name": models[0], "dtype": computed, "device": device}
        with running(command(chosen, folder, **place, more=more), log) as server:
            with spinner(f"starting {chosen}", quiet=as_json) as note:
                wait(server, log, f"{url}/health", note)
            if as_json:
                shown = {"url": f"{url}/v1", "model": models[0], "models": models, "engine": chosen}
                own = {"checkpoint": str(folder), "pid": server.pid, "log": str(log)}
                print(json.dumps(shown | own, indent=1), flush=True)
            else:
                print(_client(f"{url}/v1", models), flush=True)
            code = server.wait()
    raise AfterOutputError(f"the server ended by itself (exit code {code}): {reason_in(log)}")


def _engine(engine: str, *, needs_server: bool, quiet: bool) -> str:
    """The engine to use: vLLM, or transformers with a line that says why."""
    problem = serving_problem()
    if engine == "vllm" and problem:
        raise PreskipError(problem)
    if engine == "transformers" or problem:
        from transformers.utils.import_utils import is_serve_available

        if needs_server and not is_serve_available():
            raise PreskipError(WITHOUT_SERVER if engine == "transformers" else f"{problem}; or {WITHOUT_SERVER}")
        if engine == "auto":
            say(f"falling back to transformers, which answers one request at a time: {problem}", quiet=quiet)
        return "transformers"
    return "vllm"


def _not_in_vllm(facts: Facts) -> str | None:
    """Why vLLM cannot serve a checkpoint that transformers can; None where it can."""
    base_type = facts.config.model_type.removeprefix(PREFIX)
    return f"vLLM's Transformers backend does not load {base_type} models" if base_type in NOT_IN_VLLM else None


def _checkpoint(source: Path, model: str | None, dtype: str, trust_remote_code: bool, *, quiet: bool) -> Path:
    """The folder to serve: what is baked already, or what this bakes into the cache."""
    if source.is_file() or source.suffix == ".gguf":
        raise PreskipError(
            f"{source} is a file: GGUF and llama.cpp know no branch; give a baked checkpoint, an adapter or a run"
        )
    from preskip.runs.weights import find_source

    found = find_source(source)
    if found.run is not None:
        another = f"{found.run}/arms/ARM/seed-N/{found.weights.name}"
        say(f"arm {found.arm}, seed {found.seed}; another one is {another}", quiet=quiet)
    if found.is_checkpoint:
        for option, given in (("--model", model is not None), ("--trust-remote-code", trust_remote_code)):
            if given:
                raise PreskipError(f"{option} is for an adapter's base, and {source} is a whole model: leave it out")
        return found.weights
    if found.others:
        raise PreskipError(f"{source} carries a {found.others[0]} adapter, too: merge it into the base first")
    inner = sorted(file.parent.name for file in found.weights.glob(f"*/{ADAPTER_CONFIG}"))
    if inner and found.run is None:
        say(f"{source} also holds {', '.join(inner)}: for another give its folder, for all bake them", quiet=quiet)
    from preskip.assets.cache import cache_dir, workspace

    base, revision = base_of(found, model)
    key = _key(found.weights, base, dtype if dtype != "auto" else found.dtype, revision)
    place = cache_dir() / "baked" / key
    if not _is_whole(place):
        with workspace(f"baked-{key}") as work:
            if not _is_whole(place):  # baked by another process while we waited
                made = work / "checkpoint"
                bake_saved(
                    {"adapter": found.weights},
                    made,
                    model=model,
                    dtype=dtype,
                    trust_remote_code=trust_remote_code,
                    with_card=False,
                    quiet=quiet,
                )
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(place, ignore_errors=True)
                os.replace(made, place)
    say(f"baked checkpoint: {place}", quiet=quiet)
    return place


def _is_whole(place: Path) -> bool:
    """Whether a cached bake can be read; one that was cut short, or cleaned up in part, is baked again."""
    from preskip.serve.checkpoint import examine

    if not place.is_dir():
        return False
    quiet_libraries()
    with suppress(PreskipError):
        examine(place)
        return True
    return False


def _key(adapter: Path, base: str, dtype: str, revision: str | None = None) -> str:
    """Names what a bake depends on: content of the adapter and of the base's small files, its weight files, the dtype.

    A base on the Hub is its name and revision alone.
    """
    digest = hashlib.sha256(f"{__version__}\0{dtype}\0{base}\0{revision or ''}\0".encode())
    place = Path(base)
    of_base = sorted(place.iterdir()) if base and place.is_dir() else [place] if place.is_file() else []
    for file in filter(Path.is_file, (*sorted(adapter.iterdir()), *of_base)):
        if file.suffix in SMALL or file.name.startswith("adapter_"):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + file.read_bytes())
        elif file.suffix in (".safetensors", ".gguf"):
            digest.update(f"{file.absolute()} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:24]


def _refuse_own_options(arguments: Sequence[str]) -> None:
    """Refuse another address for the engine than where this waits for it, and what else would belie what this says."""
    for argument in arguments:
        option = argument.partition("=")[0].replace("_", "-")
        if option in OWN_OPTIONS:
            own = OWN_OPTIONS[option]
            raise PreskipError(f"--engine-args {option} is not possible: give {own} to preskip serve itself")
        if option == "--uds" or option.startswith("--ssl-"):
            raise PreskipError(
                f"--engine-args {option} is not possible: preskip serve listens on --host and --port by HTTP; put a "
                "proxy before it"
            )


def _refuse_as_lora(arguments: Sequence[str]) -> None:
    """Refuse Preskip adapters that an engine is told to take for LoRA, which it would do wrongly or not at all."""
    for argument in arguments:
        folder = argument.rpartition("=")[2]
        # Of a text too long for a path, as an engine's options in JSON are, `Path.is_file` raises.
        if not os.path.isfile(os.path.join(folder, ADAPTER_CONFIG)):
            continue
        path = Path(folder) / ADAPTER_CONFIG
        if read_config(path).get("peft_type") == PEFT_TYPE:
            raise PreskipError(
                f"{path.parent} is a Preskip adapter, which is no LoRA: its branch depends non-linearly on its input "
                f"and cannot be added to a weight; bake it, or `preskip serve {path.parent}`"
            )


def _described(facts: Facts, engine: str, dtype: str) -> str:
    described = (
        f"{facts.config.model_type}, {dtype}: {facts.weight_bytes_in(dtype) / 1e6:,.0f} MB of weights, "
        f"{facts.weight_ratio:.3f} times the base's; {facts.cache_bytes_in(dtype):,} bytes of keys and values per "
        "token, as many as the base's"
    )
    if facts.config.preskip_quantize and engine == "vllm":
        described += f"; vLLM holds the {facts.config.preskip_quantize} branches in {dtype}"
    return described


def _client(url: str, models: Sequence[str]) -> str:
    """How to ask the server, on the command line and in Python."""
    name = models[0]
    body = json.dumps({"model": name, "prompt": "The state of the Union", "max_tokens": 32})
    others = f"# or one of {', '.join(models[1:])}\n" if models[1:] else ""
    return f"""{others}curl {url}/completions -H 'Content-Type: application/json' -d '{body}'

from openai import OpenAI
client = OpenAI(base_url="{url}", api_key="none")
print(client.completions.create(model={name!r}, prompt="The state of the Union", max_tokens=32).choices[0].text)
"""
