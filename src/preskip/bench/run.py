"""Time every row of a base on every piece of work: interleaved, checked, and held against what is owed."""

from __future__ import annotations

import gc
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preskip.arms.configs import LATE, THIRD, late_layers
from preskip.bench.counts import Counts, Limits, bytes_moved, count, flops, free_memory
from preskip.bench.models import Row, Rows
from preskip.bench.observe import observe
from preskip.bench.runners import NotPossible, Runner, cache_bytes
from preskip.bench.settings import COMPILED, BenchSettings, Work
from preskip.errors import PreskipError, is_out_of_memory, one_line
from preskip.progress import Advance, no_progress
from preskip.train.speed import synchronise

# Norm of the error of the logits over the norm of the logits: what rounding, int8 weights and 8-bit caches make of it.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
COARSE = 0.25
# Rows with branches in a share of the layers, from the top.
SHARES = {"last-third": THIRD, "last-quarter": LATE}


def bench(
    base: Any,
    settings: BenchSettings,
    limits: Limits,
    *,
    adapter: Path | None = None,
    layers: int | None = None,
    trust_remote_code: bool = False,
    advance: Advance = no_progress,
) -> dict[str, Any]:
    """Measure.

    Args:
        base: a causal language model in evaluation mode, in the dtype to compute in; it is not changed.
        settings: what to measure.
        limits: what the device reaches in that dtype.
        adapter: folder of a trained Preskip adapter; None takes random branches of the paper's shape.
        layers: how many the model really has, where the base has fewer.
        trust_remote_code: the base's class is code of its repository, which may run again as its files are loaded.
        advance: is told what goes on.

    Returns:
        One JSON value (docs/bench.md).
    """
    dtype = base.dtype
    measured = base.config.get_text_config().num_hidden_layers
    works, left_out = _within_reach(base, settings.work)
    with tempfile.TemporaryDirectory() as workspace:
        source = Rows(base, dtype, adapter, Path(workspace), trust_remote_code)
        rows: dict[str, Row] = {}
        for name in settings.rows:
            advance(0, f"making {name}")
            try:
                _check_share(name, measured, layers or measured)
                rows[name] = source.make(name)
            except PreskipError as error:
                left_out[name] = str(error)
        ids = _tokens(base, works)
        wanted = _wanted(source, {row.kind for row in rows.values()}, works, ids, advance)
    counts = {name: count(row.model, dtype) for name, row in rows.items()}
    factor = layers / measured if layers else 1.0
    found = []
    for done, work in enumerate(works):
        advance(done, work.title)
        taking = {name: row for name, row in rows.items() if _takes_part(name, work, settings)}
        if not taking:
            compiled = "compiled rows take part in --compiled-work alone, of decode with a static cache"
            left_out[work.title] = "only adapter and lora train" if work.kind == "training" else compiled
            continue
        found.append(_measure(work, taking, counts, wanted, ids, limits, settings.rounds, factor))
        # The next work has other shapes; torch gives up after eight graphs of one function.
        torch.compiler.reset()
        gc.collect()
    return {
        "rows": {name: _row_facts(row, counts[name], factor) for name, row in rows.items()},
        "left_out": left_out,
        "layers": {"measured": measured, "of": layers or None},
        "limits": {
            "flops_per_second": limits.flops_per_second,
            "bytes_per_second": limits.bytes_per_second,
        },
        "rounds": settings.rounds,
        "work": found,
    }


def _check_share(name: str, measured: int, layers: int) -> None:
    """Raise unless a row's branches are in the same share of the measured layers as of all: else nothing can be scaled.

    Raises:
        PreskipError: they are not.
    """
    if name not in SHARES:
        return
    cut, whole = late_layers(SHARES[name], measured), late_layers(SHARES[name], layers)
    if cut * layers != whole * measured:
        raise PreskipError(f"branches in {whole} of {layers} layers are a share that {measured} layers do not have")


def _within_reach(base: Any, works: tuple[Work, ...]) -> tuple[tuple[Work, ...], dict[str, str]]:
    """The work that the model's positions reach for, and why the other is left out, by title."""
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    fitting = tuple(work for work in works if limit is None or work.tokens + work.new_tokens <= limit)
    if not fitting:
        raise PreskipError(f"the model reads at most {limit:,} tokens: give fewer for each work")
    return fitting, {work.title: f"the model reads at most {limit:,}" for work in works if work not in fitting}


def _takes_part(name: str, work: Work, settings: BenchSettings) -> bool:
    if work.kind == "training":
        return name in ("adapter", "lora")
    if name not in COMPILED:
        return True
    return work.kind in settings.compiled_work and (work.kind != "decode" or work.cache == "static")


def _tokens(base: Any, works: tuple[Work, ...]) -> torch.Tensor:
    rows = max(work.batch for work in works)
    columns = max(work.tokens + work.new_tokens for work in works)
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (rows, columns), generator=generator).to(base.device)


def _ids(ids: torch.Tensor, work: Work) -> torch.Tensor:
    return ids[: work.batch, : work.tokens + work.new_tokens]


def _position(work: Work) -> int:
    """The token whose logits are checked, in the first row."""
    return work.tokens if work.kind == "decode" else work.tokens - 1


def _wanted(
    source: Rows, kinds: set[str], works: tuple[Work, ...], ids: torch.Tensor, advance: Callable[..., None]
) -> dict[tuple[str, int], torch.Tensor]:
    """Logits [V] by kind and position, of one float32 pass over the first row; causal, so one pass has them all."""
    places = sorted({_position(work) for work in works})
    wanted = {}
    for kind in sorted(kinds):
        advance(0, f"reference logits of {kind}")
        model = source.reference(kind)
        for place in places:
            with torch.inference_mode():
                logits = model(input_ids=ids[:1, : place + 1], use_cache=False, logits_to_keep=1).logits
            wanted[kind, place] = logits[0, -1].float()
        del model
        gc.collect()
    return wanted


def _measure(
    work: Work,
    rows: dict[str, Row],
    counts: dict[str, Counts],
    wanted: dict[tuple[str, int], torch.Tensor],
    ids: torch.Tensor,
    limits: Limits,
    rounds: int,
    factor: float,
) -> dict[str, Any]:
    """One piece of work on all rows that can do it."""
    result: dict[str, Any] = {
        "work": work.kind,
        "batch": work.batch,
        "tokens": work.tokens,
        "new_tokens": work.new_tokens,
        "cache": work.cache or None,
        "title": work.title,
        "rows": {},
        "left_out": {},
    }
    runners: dict[str, Runner] = {}
    entries: dict[str, dict[str, Any]] = result["rows"]
    for name, row in rows.items():
        try:
            need = _need(work, counts[name], row)
            if need > 0.8 * free_memory(ids.device):
                raise NotPossible(f"needs {need / 2**30:.1f} GiB, more than is free")
            runner = Runner(row, work, _ids(ids, work))
            _warm_up(runner)
            _check(runner, wanted[row.kind, _position(work)])
            entry = _counted(runner, counts[name], limits, factor)
        except NotPossible as error:
            result["left_out"][name] = str(error)
            continue
        except Exception as error:
            _leave_out(row, error, result["left_out"])
            continue
        runners[name], entries[name] = runner, entry
    _same_cache(entries)
    seconds, graphs = _interleaved(runners, rounds, result["left_out"])
    for name in result["left_out"]:
        entries.pop(name, None)
    for name, runner in runners.items():
        entry = entries[name]
        unit = np.array(seconds[name]) / max(work.new_tokens, 1)
        entry |= _quartiles("seconds", unit)
        if name in COMPILED:
            entry["recompiles"] = graphs[name]
        against = "lora" if work.kind == "training" else runner.row.held_against
        if against in runners and against != name:
            other = entries[against]
            ratios = unit / (np.array(seconds[against]) / max(work.new_tokens, 1))
            owed = entry["seconds_owed"] / other["seconds_owed"]
            entry |= {"held_against": against, **_quartiles("ratio", ratios), "ratio_owed": owed}
            entry["times_of_limit"] = entry["ratio"] / owed
    return result


def _leave_out(row: Row, error: Exception, left_out: dict[str, str]) -> None:
    """Note a row that has no memory for a piece of work; any other error is raised again."""
    if not is_out_of_memory(error):
        raise error
    left_out[row.name] = "out of memory"
    row.model.eval().zero_grad()  # a training that ends midway leaves it otherwise


def _warm_up(runner: Runner) -> None:
    """Run once; a compiled row compiles then, and on CUDA its graph is captured in the second run.

    Raises:
        NotPossible: it does not compile here (no compiler, a graph break in the base).
    """
    is_compiled = runner.row.name in COMPILED
    try:
        for _ in range(3 if is_compiled and runner.ids.device.type == "cuda" else 1):
            runner.before()
            runner.run()
    except PreskipError:
        raise
    except Exception as error:
        if not is_compiled or is_out_of_memory(error):
            raise
        raise NotPossible(f"does not compile: {one_line(error, 200) or type(error).__name__}") from error


def _check(runner: Runner, wanted: torch.Tensor) -> None:
    """Raise unless the logits are those of the float32 reference, to what the dtype makes of them.

    Raises:
        NotPossible: they are not.
    """
    found = runner.logits
    assert found is not None
    is_coarse = runner.work.cache == "quantized" or runner.row.name == "int8"
    tolerance = COARSE if is_coarse else TOLERANCE[runner.row.model.dtype]
    error = ((found.float() - wanted).norm() / wanted.norm()).item()
    if not error <= tolerance:
        raise NotPossible(f"wrong logits: off by {error:.2g} of their norm, {tolerance:g} is allowed")


def _need(work: Work, counts: Counts, row: Row) -> int:
    """Bytes that the cache and the logits of a piece of work take, roughly."""
    size = row.model.dtype.itemsize
    tokens = work.batch * (work.tokens + work.new_tokens)
    vocabulary = row.model.config.get_text_config().vocab_size
    kept = tokens if work.kind in ("scoring", "training") else work.batch
    return 2 * tokens * counts.cache_width * size + 3 * kept * vocabulary * 4


def _counted(runner: Runner, counts: Counts, limits: Limits, factor: float) -> dict[str, Any]:
    """What a run does, and the least time it takes."""
    work, row = runner.work, runner.row
    itemsize = 1 if work.cache == "quantized" else row.model.dtype.itemsize
    entry: dict[str, Any] = {
        "flops": flops(counts, work),
        "bytes": bytes_moved(counts, work, itemsize),
        "cache_bytes": cache_bytes(runner.cache) if runner.cache is not None else None,
    }
    entry["seconds_owed"] = limits.seconds(entry["flops"], entry["bytes"])
    if factor != 1.0:
        full = counts.scaled(factor)
        entry["seconds_owed_by_all_layers"] = limits.seconds(flops(full, work), bytes_moved(full, work, itemsize))
    if row.name not in COMPILED:
        runner.before()
        seen = observe(runner.run, row.model, runner.ids.device)
        entry["operations"] = seen.operations / max(work.new_tokens, 1)
        tensors = (*row.model.parameters(), *row.model.buffers())
        entry["peak_bytes"] = seen.bytes + sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return entry


def _graphs() -> int:
    """Graphs that torch.compile has made so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _same_cache(entries: dict[str, dict[str, Any]]) -> None:
    """A branch leaves the K/V cache as it is: every row's has the base's bytes."""
    sizes = {name: entry["cache_bytes"] for name, entry in entries.items() if not name.endswith("-compiled")}
    if len(set(sizes.values())) > 1:
        raise PreskipError(f"the K/V caches differ in size: {sizes}")


def _interleaved(
    runners: dict[str, Runner], rounds: int, left_out: dict[str, str]
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each run, one of each row per round, every other round in reverse; and graphs compiled meanwhile.

    A row that runs out of memory, as where another process takes some, is taken out of `runners` and named.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    graphs = dict.fromkeys(runners, 0)
    for number in range(rounds):
        for name in list(runners)[:: -1 if number % 2 else 1]:
            runner, before = runners[name], _graphs()
            try:
                runner.before()
                synchronise(runner.ids.device)
                started = time.perf_counter()
                runner.run()
                synchronise(runner.ids.device)
            except Exception as error:
                _leave_out(runners.pop(name).row, error, left_out)
                continue
            seconds[name].append(time.perf_counter() - started)
            graphs[name] += _graphs() - before
    return seconds, graphs


def _quartiles(name: str, values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {name: float(middle), f"{name}_low": float(low), f"{name}_high": float(high)}


def _row_facts(row: Row, counts: Counts, factor: float) -> dict[str, Any]:
    """Counts of all layers, where `factor` times as many are counted as the row has; load time and files of its own."""
    full = counts.scaled(factor)
    weights = 0.0
    for name, tensor in (*row.model.named_parameters(), *row.model.named_buffers()):
        if isinstance(tensor, torch.nn.Parameter) or tensor.dtype == torch.int8:
            weights += tensor.numel() * (factor if re.search(r"\.\d+\.", name) else 1.0)
    return {
        "weights": round(weights),
        "weight_bytes_read": full.weight_bytes,
        "flops_per_token": 2 * (full.body + full.head),
        **row.facts,
    }
