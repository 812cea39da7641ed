"""`preskip bench`: what a branch costs at inference and in training, against what its bytes and FLOPs owe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

from preskip.bench.settings import CACHES, COMPILED, ROWS, WORK, BenchSettings, Work
from preskip.cli.libraries import loading_libraries
from preskip.cli.options import Device, Dtype, Json, Model, TrustRemoteCode, flag, for_other, refuse_unused
from preskip.errors import PreskipError

DEFAULT_MODEL = "smollm2"
# What compiled rows take part in: training is of rows that are not compiled.
COMPILABLE = tuple(kind for kind in WORK if kind != "training")
_SHOWN = ",".join(name for name in ROWS if name not in ("low-rank", "bottleneck", "last-quarter", "skip"))


def bench(
    model: Model = DEFAULT_MODEL,
    *,
    adapter: Annotated[Optional[Path], flag("Folder of a Preskip adapter. Default: random branches.", "Model")] = None,
    model_shape: Annotated[
        Optional[str], flag("Random weights of a shape in place of a model: pythia-160m, llama-3-8b, ...", "Model")
    ] = None,
    num_layers: Annotated[
        Optional[int], flag("Layers of --model-shape to measure. Default: all that fit.", "Model", hint=int, least=1)
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    rows: Annotated[str, flag(f"What to compare: {', '.join(ROWS)}; all.", "How much", is_list=True)] = _SHOWN,
    work: Annotated[str, flag(f"What to time: {', '.join(WORK)}.", "How much", is_list=True)] = ",".join(WORK),
    prompt: Annotated[str, flag("Tokens of a prefill.", "How much", is_list=True)] = "128,512,2048",
    batch: Annotated[str, flag("Rows decoded at once.", "How much", is_list=True)] = "1,8,64",
    cache: Annotated[
        str, flag(f"K/V caches: {', '.join(CACHES)}; all at the first batch.", "How much", is_list=True)
    ] = ",".join(CACHES),
    context: Annotated[int, flag("Tokens in the cache before decoding.", "How much", hint=int, least=1)] = 128,
    new_tokens: Annotated[int, flag("Decoding steps per measurement.", "How much", hint=int, least=1)] = 16,
    scoring: Annotated[str, flag("Batch scored, rows x tokens.", "How much")] = "4x256",
    training: Annotated[str, flag("Batch trained on, rows x tokens.", "How much")] = "8x128",
    compiled_work: Annotated[
        str, flag("Work of compiled rows; each of its shapes takes minutes to compile.", "How much", is_list=True)
    ] = "decode",
    rounds: Annotated[int, flag("Measurements of every row.", "How much", hint=int, least=2)] = 7,
    as_json: Json = False,
) -> None:
    """Time the base, Preskip and LoRA of the same size, interleaved, against what their bytes and FLOPs owe.

    A row whose logits are wrong gets no time.
    """
    settings = BenchSettings(
        rows=tuple(ROWS) if rows == "all" else _names(rows, "--rows", ROWS),
        work=_work(work, prompt, batch, cache, context, new_tokens, scoring, training),
        compiled_work=_names(compiled_work, "--compiled-work", COMPILABLE),
        rounds=rounds,
    )
    kinds = {its.kind for its in settings.work}
    of_work = {
        "prefill": ("prompt",),
        "decode": ("batch", "cache", "context", "new_tokens"),
        "scoring": ("scoring",),
        "training": ("training",),
    }
    needs = {for_other(f"--work {kind}"): (kind in kinds, names) for kind, names in of_work.items()}
    needs[for_other("compiled --rows")] = (bool({*settings.rows} & {*COMPILED}), ("compiled_work",))
    refuse_unused(bench, locals(), needs)
    if num_layers is not None and model_shape is None:
        raise PreskipError("--num-layers is for a --model-shape, and a model has its own: leave it out")
    if model != DEFAULT_MODEL and model_shape is not None:
        raise PreskipError(f"give either the model {model} or --model-shape {model_shape}")
    from preskip.progress import progress_bar, spinner

    with loading_libraries(quiet=as_json):
        import torch

        from preskip.assets import load_model
        from preskip.bench.counts import measure_limits
        from preskip.bench.models import random_base
        from preskip.bench.run import bench as measure
        from preskip.runs import environment
    device = environment.resolve_device(device)
    resolved, _ = environment.resolve_dtype(dtype, device)
    kind, place = getattr(torch, resolved), torch.device(device)
    if adapter is not None and model_shape is not None:
        raise PreskipError("give either --adapter or --model-shape: a random model has no trained adapter")
    layers = None
    with spinner(f"loading {model_shape or model} ({resolved})", quiet=as_json):
        if model_shape is None:
            base = load_model(model, dtype=kind, device=place, trust_remote_code=trust_remote_code)
        else:
            from preskip.architecture.shapes import shape_config

            config = shape_config(model_shape, branch=None)
            layers = config.num_hidden_layers
            if num_layers is not None:
                if num_layers > layers:
                    raise PreskipError(f"--num-layers {num_layers} is more than {model_shape} has: {layers}")
                config.num_hidden_layers = num_layers
            base = random_base(config, kind, place, len(settings.rows))
    with spinner("measuring the device", quiet=as_json):
        limits = measure_limits(place, kind)
    with progress_bar("bench", len(settings.work), quiet=as_json) as advance:
        found = measure(
            base,
            settings,
            limits,
            adapter=adapter,
            layers=layers,
            trust_remote_code=trust_remote_code,
            advance=advance,
        )
    result: dict[str, Any] = {
        "model": model_shape or model,
        "adapter": str(adapter) if adapter else None,
        "dtype": resolved,
        "environment": environment.describe(device),
        **found,
    }
    if as_json:
        print(json.dumps(result, indent=1))
    else:
        print_bench(result)


def _names(text: str, flag_name: str, allowed: Any) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in allowed]
    if unknown or not names:
        raise PreskipError(f"{flag_name} {(unknown or [text])[0]!r}: choose of {', '.join(allowed)}")
    return tuple(dict.fromkeys(names))


def _numbers(text: str, flag_name: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part.replace("_", "")) for part in text.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise PreskipError(f"{flag_name} {text!r} is not possible: give whole numbers above 0, as 1,8,64")
    return numbers


def _shape(text: str, flag_name: str) -> tuple[int, int]:
    rows, _, tokens = text.partition("x")
    if not (rows.isdecimal() and tokens.isdecimal() and int(rows) > 0 and int(tokens) > 1):
        raise PreskipError(f"{flag_name} {text!r} is not possible: give rows x tokens, as 8x128")
    return int(rows), int(tokens)


def _work(
    work: str, prompt: str, batch: str, cache: str, context: int, new_tokens: int, scoring: str, training: str
) -> tuple[Work, ...]:
    """Each kind with its sizes; other caches than the first at the first batch only."""
    kinds, caches = _names(work, "--work", WORK), _names(cache, "--cache", CACHES)
    lengths, batches = _numbers(prompt, "--prompt"), _numbers(batch, "--batch")
    shapes = {"scoring": _shape(scoring, "--scoring"), "training": _shape(training, "--training")}
    found: list[Work] = []
    for kind in kinds:
        if kind == "prefill":
            found += [Work(kind=kind, batch=1, tokens=tokens) for tokens in lengths]
        elif kind == "decode":
            pairs = [(rows, name) for rows in batches for name in caches if rows == batches[0] or name == caches[0]]
            found += [
                Work(kind=kind, batch=rows, tokens=context, new_tokens=new_tokens, cache=name) for rows, name in pairs
            ]
        else:
            rows, tokens = shapes[kind]
            found.append(Work(kind=kind, batch=rows, tokens=tokens))
    return tuple(found)


def print_bench(result: dict[str, Any]) -> None:
    """One table per piece of work; none is wider than 80 columns."""
    from preskip.cli.printing import columns, console, print_table

    limits, layers = result["limits"], result["layers"]
    where = result["environment"]
    notes = [
        f"{result['model']}, {result['dtype']}, {where['device']}, {where['threads']} threads",
        f"copies {limits['bytes_per_second'] / 1e9:.1f} GB/s, products {limits['flops_per_second'] / 1e12:.2f} TFLOP/s",
    ]
    is_scaled = bool(layers["of"]) and layers["measured"] != layers["of"]
    if is_scaled:
        notes.append(
            f"{layers['measured']} of {layers['of']} layers measured, "
            "ms and ratios scaled to all of them by what is owed"
        )
    table = columns("row", right=("weights", "MB read", "GFLOP/token", "load s", "file MB"))
    for name, row in result["rows"].items():
        load, size = row.get("load_seconds"), row.get("file_bytes")
        table.add_row(
            name,
            f"{row['weights'] / 1e6:,.1f}M",
            f"{row['weight_bytes_read'] / 1e6:,.1f}",
            f"{row['flops_per_token'] / 1e9:.3f}",
            f"{load:.2f}" if load is not None and not is_scaled else "–",
            f"{size / 1e6:,.1f}" if size is not None and not is_scaled else "–",
        )
    print_table(table, notes, [f"{name}: {reason}" for name, reason in result["left_out"].items()])
    for work in result["work"]:
        table = columns("row", right=("ms", "time ratio", "owed", "x limit", "peak MB"))
        references = ("lora",) if work["work"] == "training" else ("base", "base-compiled")
        for name, entry in work["rows"].items():
            ratio = entry.get("ratio")
            without = "1" if name in references else "–"
            scale = _to_all_layers(entry)
            by = scale / _to_all_layers(work["rows"][entry["held_against"]]) if ratio else 1.0
            table.add_row(
                name,
                f"{1e3 * scale * entry['seconds']:,.1f}",
                f"{by * ratio:.3f} [{by * entry['ratio_low']:.2f}, {by * entry['ratio_high']:.2f}]"
                if ratio
                else without,
                f"{by * entry['ratio_owed']:.3f}" if ratio else without,
                f"{entry['times_of_limit']:.3f}" if ratio else "–",
                f"{entry['peak_bytes'] / 1e6:,.0f}" if "peak_bytes" in entry and not is_scaled else "–",
            )
        caches = {entry["cache_bytes"] for entry in work["rows"].values() if entry["cache_bytes"]}
        lines = [f"{name}: {reason}" for name, reason in work["left_out"].items()]
        of = "the measured layers of every row" if is_scaled else "every row"
        notes = [f"K/V cache of {of}: {', '.join(f'{size / 1e6:,.2f} MB' for size in sorted(caches))}"]
        console().print(work["title"], style="bold", highlight=False)
        print_table(table, notes if caches else (), lines)
    _say_how_to_read(result)


def _to_all_layers(entry: dict[str, Any]) -> float:
    """What a row's time is multiplied by where fewer layers than all were measured: as what it owes grows.

    The time ratio and the owed one grow alike by it, so that what one is over the other, `x limit`, stays as measured.
    """
    return entry.get("seconds_owed_by_all_layers", entry["seconds_owed"]) / entry["seconds_owed"]


def _say_how_to_read(result: dict[str, Any]) -> None:
    from preskip.progress import say

    compiled = any(name in COMPILED for name in result["rows"])
    say(
        f"Medians of {result['rounds']} interleaved rounds; ratios are paired by round, with their middle half. They "
        f"are to the base{', of compiled rows to the compiled base' if compiled else ''}, in training to LoRA. Owed: "
        "the ratio that bytes and FLOPs make inevitable on this device."
    )
