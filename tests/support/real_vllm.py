"""Tiny checkpoints for the real vLLM, its scores of them judged, and what was found as a table."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from preskip import PreskipConfig, bake
from preskip.architecture import architecture
from preskip.quantizing import quantize
from preskip.serve.check import compare, engine_scores, transformers_scores
from preskip.serve.checkpoint import examine, without_branch
from preskip.serve.versions import vllm_version
from tiny_text import tiny_tokenizer

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
    "gemma3, residual": ("gemma3_text", GEMMA, {"preskip_skip_position": "residual"}),
}
GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(2, 400, (n,), generator=GENERATOR).tolist() for n in (5, 17, 40, 64)]
# They share a beginning of two K/V blocks, and are longer than what one step of `COMPILED` may compute.
LONG = [PROMPTS[3] * 4 + prompt for prompt in PROMPTS]

EAGER = {"enforce_eager": True}
PARALLEL = {**EAGER, "tensor_parallel_size": 2}
CACHED = {"enable_prefix_caching": True, "max_num_batched_tokens": 64, "max_num_seqs": 4}
COMPILED = {"enforce_eager": False, **CACHED}
NAMES = {"tensor_parallel_size": "tensor parallel over 2", "max_num_batched_tokens": "chunked prefill, prefix cache"}

FOUND: list[tuple[str, ...]] = []
HEADINGS = ("checkpoint", "dtype, mode", "largest difference", "branch off", "tokens equal", "K/V blocks", "seconds")


def randomise(model, seed=1):
    """Random weights, the branch's strong."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            small = parameter.ndim == 1
            parameter.copy_(parameter + noise * 0.05 if small else noise * (0.2 if ".preskip." in name else 0.1))


def save_case(case: str, root: Path) -> tuple[Path, Path]:
    """The tiny random checkpoint of a case, and its base."""
    base_type, settings, branch = CASES[case]
    family = architecture(base_type)
    model = family.causal_lm(family.config(**settings, **branch)).eval()
    randomise(model)
    folder = root / case.replace(", ", "-")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, without_branch(folder, root / f"{folder.name}-base")


def save_int8(folder: Path, out: Path) -> Path:
    """The same checkpoint with its branches in int8."""
    shutil.copytree(folder, out)
    tensors = {}
    for key, value in load_file(folder / "model.safetensors").items():
        if ".preskip." in key:
            tensors[key], tensors[f"{key.removesuffix('weight')}scale"] = quantize(value, torch.float32)
        else:
            tensors[key] = value
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"preskip_quantize": "int8"}))
    return out


def save_several(root: Path, names: list[str]) -> Path:
    """Adapters of different make on one tiny Llama, baked side by side."""
    family = architecture("llama").causal_lm.__bases__[-1]
    base = family(family.config_class(**GROUPED)).eval()
    randomise(base)
    makes = [{}, {"gated": True, "expansion": 0.5}, {"enrich_attention": False}]
    model = get_peft_model(base, PreskipConfig(), adapter_name=names[0])
    for name, make in zip(names[1:], makes[1:], strict=False):
        model.add_adapter(name, PreskipConfig(**make))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".preskip." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return bake(model.eval(), root / "several", adapter=names, tokenizer=tiny_tokenizer())


def judged(name, place, options, dtype="float32", prompts=PROMPTS):
    """The engine's scores of a checkpoint, judged as `preskip serve --check` does; for float32 the base runs not.

    Args:
        name: of the checkpoint, in the table.
        place: its folder and its base's.
        options: of the engine.
        dtype: in which all compute.
        prompts: token ids.
    """
    folder, base = place
    begin = time.monotonic()
    ours = engine_scores("vllm", folder, dtype, prompts, options)
    seconds = time.monotonic() - begin
    assert (ours["cached"] >= 3 * 256) if "enable_prefix_caching" in options else (ours["cached"] == 0)
    expected, without = [transformers_scores(which, dtype, prompts) for which in (folder, base)]
    its_base = {**without, "blocks": ours["blocks"]}
    if dtype != "float32":
        its_base = engine_scores("vllm", base, dtype, prompts, {**EAGER, "model_impl": "transformers"})

    def rounding():
        exact = (transformers_scores(which, "float32", prompts) for which in (folder, base))
        own, bases = (mean_difference(a, b) for a, b in zip((expected, without), exact, strict=True))
        return own / bases

    found = compare(
        examine(folder), "vllm", dtype, ours=ours, base=its_base, expected=expected, without=without, rounding=rounding
    )
    modes = [words for option, words in NAMES.items() if option in options]
    largest, blocks = f"{found.largest:.2g}", f"{found.blocks}"
    if dtype != "float32":
        largest += f" (base {found.base_largest:.2g}; means {found.mean:.2g} and {found.base_mean:.2g})"
        blocks += f" (base {found.base_blocks})"
    FOUND.append((
        name, ", ".join([dtype, "eager" if options["enforce_eager"] else "compiled", *modes]), largest,
        f"{found.without_largest:.2g}", f"{found.greedy_equal} of {found.greedy}", blocks, f"{seconds:.0f}",
    ))  # fmt: skip
    print(f"\n{' | '.join(FOUND[-1])}", flush=True)
    return found


def mean_difference(a, b):
    first, second = (torch.tensor([value for row in scores["logprobs"] for value in row]) for scores in (a, b))
    return (first - second).abs().mean().item()


def table() -> list[str]:
    """What was found as lines of Markdown, with the versions and the machine."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    machine = f"{os.cpu_count()} cores, {cpu.partition(':')[2].strip() or platform.machine()}"
    flags = Path("/proc/cpuinfo").read_text()
    best = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {flag} " in flags), "")
    rows = [" | ".join(("", *row, "")).strip() for row in (HEADINGS, ("---",) * len(HEADINGS), *FOUND)]
    return [f"vLLM {vllm_version()}, {packages}, Python {platform.python_version()}; {machine}, {best}", "", *rows]
