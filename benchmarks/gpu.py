"""Everything that has to hold on an accelerator, in one process of at most ten minutes: one line of JSON per part.

    python benchmarks/gpu.py [--device cuda] [--parts adapter,bench,...] [--tiny]      (make gpu)

It needs torch, transformers, peft, this repository's src/ on the path and what `preskip` itself depends on; no network
and no data set. A part that fails says why and the others go on; the exit code is then 1. `--tiny` are the same parts
on small sizes, as the tests run them on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "pad_token_id": None, "eos_token_id": None,
}  # fmt: skip
# Shapes to bench in bfloat16, with what is timed on each; the largest one last.
SHAPES = ("llama-106m", "pythia-410m", "llama-3-8b")


def base(dtype: torch.dtype, device: torch.device, model_type: str = "llama", seed: int = 0) -> Any:
    """A small random model: the same weights on every device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **SIZES)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(device)


def adapted(dtype: torch.dtype, device: torch.device, **fields: Any) -> Any:
    """A small model with a branch that changes its logits."""
    from peft import get_peft_model

    from preskip import PreskipConfig

    model = get_peft_model(base(dtype, device), PreskipConfig(**fields))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".preskip." in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def tokens(device: torch.device, rows: int = 3, columns: int = 63) -> torch.Tensor:
    """Random tokens, the same on every device."""
    return torch.randint(SIZES["vocab_size"], (rows, columns), generator=torch.Generator().manual_seed(2)).to(device)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, over the largest value."""
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def require(holds: bool, what: str) -> None:
    """Raise unless it holds."""
    if not holds:
        raise AssertionError(what)


def parity(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Logits and every gradient against the CPU, per dtype and kind of branch."""
    torch.backends.cuda.matmul.allow_tf32 = False
    found = {}
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        for label, fields in {
            "full": {}, "low-rank": {"skip_rank": 16}, "gated": {"gated": True}, "bypass": {"enrich_attention": False},
        }.items():  # fmt: skip
            models = [adapted(dtype, place, **fields) for place in (torch.device("cpu"), device)]
            logits, slopes = [], []
            for model, place in zip(models, (torch.device("cpu"), device), strict=True):
                out = model(input_ids=tokens(place), labels=tokens(place))
                out.loss.backward()
                logits.append(out.logits)
                slopes.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            require(slopes[0].keys() == slopes[1].keys(), "other weights have gradients")
            error = distance(logits[1], logits[0])
            slope = max(distance(slopes[1][name], slopes[0][name]) for name in slopes[0])
            found[f"{label} {dtype}".replace("torch.", "")] = {"logits": error, "gradients": slope}
            require(max(error, slope) <= tolerance, f"{label} in {dtype}: off by {error:.2g} and {slope:.2g}")
    return found


def adapter(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Save, load, disable and generate; the optimised adapter, eager and compiled with CUDA graphs."""
    from peft import PeftModel
    from transformers import StaticCache

    import preskip
    from preskip.bench.runners import with_cache

    model, ids = adapted(torch.bfloat16, device), tokens(device)
    require({p.device.type for p in model.parameters()} == {device.type}, "a weight is elsewhere")
    require({p.dtype for n, p in model.named_parameters() if ".preskip." in n} == {torch.float32}, "masters not fp32")
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        with model.disable_adapter():
            require(
                torch.equal(model(input_ids=ids).logits, base(torch.bfloat16, device)(input_ids=ids).logits), "base"
            )
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(base(torch.bfloat16, device), folder).eval()
        require(torch.equal(loaded(input_ids=ids).logits, wanted), "loaded, the logits differ")
        words = [m.generate(input_ids=ids[:1], max_new_tokens=8, do_sample=False) for m in (model, loaded)]
        require(torch.equal(*words), "generation differs")
        with preskip.optimize(model) as handle:
            require(handle.attentions == SIZES["num_hidden_layers"], "not every attention is optimised")
            optimised = distance(model(input_ids=ids).logits, wanted)
            require(optimised <= (0 if device.type == "cuda" else 2e-2), f"optimised: off by {optimised:.2g}")
            cache = StaticCache(config=model.config, max_cache_len=64)
            model(input_ids=ids[:, :40], **with_cache(cache))
            torch.compiler.reset()
            options = {"mode": "reduce-overhead"} if device.type == "cuda" else {"backend": "eager"}
            step = torch.compile(model.get_base_model(), fullgraph=True, dynamic=False, **options)
            counters = torch._dynamo.utils.counters["stats"]
            errors, graphs = [], None
            for place in range(40, 60):
                torch.compiler.cudagraph_mark_step_begin()
                logits = step(input_ids=ids[:, place : place + 1], **with_cache(cache)).logits
                errors.append(distance(logits[:, 0], wanted[:, place]))
                graphs = counters["unique_graphs"] if graphs is None else graphs
            require(max(errors) <= 5e-2, f"decoding compiled: off by {max(errors):.2g}")
            require(counters["unique_graphs"] == graphs, "decoding compiled again")
    return {"optimised_error": optimised, "compiled_error": max(errors), "recompiles": 0}


def architecture(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Baked, and baked with an int8 branch: the logits of the adapter; its cache has the base's bytes."""
    from transformers import AutoModelForCausalLM

    from preskip import bake
    from preskip.bench.runners import cache_bytes, new_cache, with_cache

    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, ids = adapted(dtype, device), tokens(device)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            wanted = model(input_ids=ids).logits
            bake(model, Path(folder) / "same")
            bake(model, Path(folder) / "int8", quantize="int8")
            for name, most in (("same", 0.0), ("int8", 0.2)):
                baked = AutoModelForCausalLM.from_pretrained(Path(folder) / name, dtype=dtype).to(device).eval()
                error = distance(baked(input_ids=ids).logits, wanted)
                require(error <= most, f"{name} in {dtype}: off by {error:.2g}")
                found[f"{name} {dtype}".replace("torch.", "")] = error
            sizes = []
            for each in (base(dtype, device), baked):
                cache = new_cache("dynamic", each, 63)
                each(input_ids=ids, **with_cache(cache))
                sizes.append(cache_bytes(cache))
            require(sizes[0] == sizes[1], f"the caches have {sizes} bytes")
    return found


def training(device: torch.device, tiny: bool) -> dict[str, Any]:
    """fp32 masters beside a bfloat16 base: they move at 1e-5, and checkpointing changes no gradient."""
    model = adapted(torch.bfloat16, device)
    ids = tokens(device, 4, 32)
    weights = {name: p for name, p in model.named_parameters() if ".preskip." in name}
    slopes = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        slopes.append({name: p.grad.clone() for name, p in weights.items()})
        model.zero_grad()
    worst = max(distance(slopes[1][name], slopes[0][name]) for name in weights)
    require(worst <= 2e-2, f"checkpointed gradients: off by {worst:.2g}")
    before = {name: p.detach().clone() for name, p in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-5)
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    moved = torch.cat([(before[name] != p).flatten() for name, p in weights.items()]).float().mean().item()
    require(moved > 0.99, f"only {moved:.1%} of the weights have moved")
    require(losses[-1] < losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}")
    return {"checkpointing_error": worst, "moved": moved, "losses": [losses[0], losses[-1]]}


def scoring(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Log-likelihoods of the package's own scoring against one plain pass, batched and one by one, and the CPU."""
    from preskip.data.blocks import Window
    from preskip.evaluate.likelihood import score_sequences

    lengths = (9, 23, 40, 63)
    rows = [tokens(torch.device("cpu"))[0, :length].tolist() for length in lengths]
    windows = [Window(ids, 1) for ids in rows]
    found = {}
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 5e-2)):
        model = adapted(dtype, device)
        scores = [score.nll for score in score_sequences(model, windows)]
        alone = [score_sequences(model, [window])[0].nll for window in windows]
        plain = []
        with torch.no_grad():
            for ids in rows:
                logits = model(input_ids=torch.tensor([ids], device=device)).logits[0, :-1].float()
                plain.append(F.cross_entropy(logits, torch.tensor(ids[1:], device=device), reduction="sum").item())
        there = [score.nll for score in score_sequences(adapted(dtype, torch.device("cpu")), windows)]
        errors = {
            name: max(abs(a / b - 1) for a, b in zip(scores, others, strict=True))
            for name, others in (("alone", alone), ("plain", plain), ("cpu", there))
        }
        require(max(errors.values()) <= tolerance, f"scores in {dtype}: off by {errors}")
        found[str(dtype).removeprefix("torch.")] = errors
    return found


def bench(device: torch.device, tiny: bool) -> dict[str, Any]:
    """`preskip bench` in bfloat16 on the layer shapes of SmolLM2, Pythia-410M and Llama-3-8B."""
    from preskip.architecture.shapes import shape_config
    from preskip.bench.counts import measure_limits
    from preskip.bench.models import random_base
    from preskip.bench.run import bench as measure
    from preskip.bench.settings import BenchSettings, Work

    rows: tuple[str, ...] = ("base", "adapter", "optimized", "baked", "lora", "lora-merged", "int8", "last-third")
    sizes = (7, 2, 2) if tiny else (512, 8, 32)
    if not tiny:
        rows += ("base-compiled", "baked-compiled")
    work = (
        Work(kind="prefill", batch=1, tokens=sizes[0]),
        Work(kind="prefill", batch=1, tokens=4 * sizes[0]),
        *(
            Work(kind="decode", batch=batch, tokens=sizes[0] // 4 + 1, new_tokens=sizes[2], cache=cache)
            for batch, cache in ((1, "dynamic"), (1, "static"), (sizes[1], "static"), (8 * sizes[1], "dynamic"))
        ),
        Work(kind="scoring", batch=sizes[1], tokens=sizes[0]),
        Work(kind="training", batch=sizes[1], tokens=sizes[0]),
    )
    limits = measure_limits(device, torch.bfloat16, seconds=0.02 if tiny else 1.0, size=64 if tiny else None)
    found = {}
    for name in SHAPES[:1] if tiny else SHAPES:
        config = shape_config(name, branch=None)
        layers = config.num_hidden_layers
        if tiny:
            config = shape_config("llama-1m", branch=None, num_hidden_layers=2)
            layers = 2
        # Compiled rows only on the smallest shape: every graph takes its time.
        kept = tuple(row for row in rows if not row.endswith("-compiled") or name == SHAPES[0])
        model = random_base(config, torch.bfloat16, device, len(kept))
        settings = BenchSettings(rows=kept, work=work, rounds=2 if tiny else 7)
        found[name] = measure(model, settings, limits, layers=layers)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def probe(device: torch.device, tiny: bool) -> dict[str, Any]:
    """The command with the paper's protocol sizes (16 x 512 tokens, micro-batches of 4) on a random Pythia-160M."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from preskip.architecture.shapes import shape_config
    from preskip.cli.main import main as preskip

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        text = [f"{F.__doc__ or ''} sentence {index} of the topic {index % 17}." for index in range(400)]
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.ByteLevel()  # type: ignore[assignment]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(
            text, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "<unk>"], initial_alphabet=alphabet)
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>", unk_token="<unk>")
        tokenizer.save_pretrained(place / "model")
        config = shape_config(
            "pythia-160m",
            branch=None,
            **({"num_hidden_layers": 2, "hidden_size": 48, "vocab_size": 400} if tiny else {}),
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place / "model")
        sizes = (2, 2, 1, 16) if tiny else (20, 16, 4, 512)
        arguments = ["probe", str(place / "model"), "--corpus", "pydoc", "--arms", "none,preskip,lora", "--seeds", "42"]
        arguments += ["--steps", str(sizes[0]), "--batch-size", str(sizes[1]), "--micro-batch-size", str(sizes[2])]
        arguments += ["--seq-len", str(sizes[3]), "--lr", "1e-5", "--init-weights", "paper", "--dtype", "bfloat16"]
        arguments += ["--gradient-checkpointing", "--eval-documents", "4", "--eval-words", "60", "--last-word-items"]
        arguments += [
            "0",
            "--match",
            "none",
            "--lora-rank",
            "0.625",
            "--lora-scale",
            "2",
            "--context-length",
            str(sizes[3]),
            "--device",
            device.type,
            "--out",
            str(place / "run"),
        ]
        quiet, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115 - put back below
        try:
            preskip([*arguments, "--json"])
        except SystemExit as end:
            require(not end.code, f"preskip probe ended with {end.code}")
        finally:
            sys.stdout.close()
            sys.stdout = quiet
        results = json.loads((place / "run" / "results.json").read_text())
    steps = {name: arm.get("seconds_per_step") for name, arm in results["arms"].items()}
    peaks = {name: arm.get("peak_memory_bytes") for name, arm in results["arms"].items()}
    return {"seconds_per_step": steps, "peak_memory_bytes": peaks}


def ddp(device: torch.device, tiny: bool) -> dict[str, Any]:
    """One process of DistributedDataParallel: the gradients of the plain model, no parameter unused."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    plain = adapted(torch.bfloat16, device).train()
    twin = copy.deepcopy(plain)
    ids = tokens(device)
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            wrapped = DistributedDataParallel(twin, device_ids=[0] if device.type == "cuda" else None)
            for _ in range(2):  # the second pass would stop at a parameter that the first has not used
                for model in (plain, wrapped):
                    model.zero_grad()
                    model(input_ids=ids, labels=ids).loss.backward()
        finally:
            distributed.destroy_process_group()
    slopes = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    worst = max(distance(p.grad, slopes[name]) for name, p in twin.named_parameters() if p.grad is not None)
    require(worst <= 1e-6, f"gradients: off by {worst:.2g}")
    return {"gradient_error": worst}


PARTS: dict[str, Callable[[torch.device, bool], dict[str, Any]]] = {
    part.__name__: part for part in (parity, adapter, architecture, training, scoring, ddp, bench, probe)
}


def run_part(name: str, device: torch.device, tiny: bool) -> dict[str, Any]:
    """One part as one JSON value; what it raises is told, not raised."""
    started = time.perf_counter()
    entry: dict[str, Any] = {"part": name, "device": device_name(device), "ok": True}
    try:
        entry["found"] = PARTS[name](device, tiny)
    except (Exception, SystemExit) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:500]
        entry |= {"ok": False, "error": f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"}
    return entry | {"seconds": round(time.perf_counter() - started, 1)}


def device_name(device: torch.device) -> str:
    """Of the accelerator, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def main() -> None:
    """Run the parts and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"no part {unknown[0]!r}: choose of {', '.join(PARTS)}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    device = torch.device(arguments.device)
    entries = []
    for name in names:
        entry = run_part(name, device, arguments.tiny or device.type == "cpu")
        print(json.dumps(entry), flush=True)
        entries.append(entry)
    sys.exit(0 if all(entry["ok"] for entry in entries) else 1)


if __name__ == "__main__":
    main()
