"""`preskip eval`: lm-eval tasks and bits per byte of texts, on a model with or without an adapter."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

from preskip.cli.libraries import loading_libraries
from preskip.cli.options import (
    AttnImplementation,
    BatchTokens,
    CorpusSplit,
    DataDir,
    Device,
    Dtype,
    Json,
    Model,
    SampleSeed,
    TextColumn,
    TrustRemoteCode,
    chosen_context,
    flag,
    for_other,
    options_of,
    refuse_unused,
)
from preskip.errors import PreskipError
from preskip.evaluate.task_settings import TaskSettings
from preskip.experiment.parse import parse_names

if TYPE_CHECKING:
    from torch import nn

# Without --context-length no more than this is read at once, whatever the model could.
LONGEST_CONTEXT = 2048
# Resamples for lm-eval's own standard errors, of metrics that have no formula.
_BOOTSTRAP = 1000


@options_of(TaskSettings)
def evaluate(
    model: Model,
    *,
    adapter: Annotated[Optional[Path], flag("Folder of a PEFT adapter of any type.", "What")] = None,
    tasks: Annotated[str, flag("lm-eval tasks, separated by commas.", "What", is_list=True)] = "",
    corpus: Annotated[
        Optional[list[str]], flag("Text: wikitext2, sotu, a file or folder, a Hub id; repeatable.", "What")
    ] = None,
    text_column: TextColumn = None,
    corpus_split: CorpusSplit = None,
    data_dir: DataDir = None,
    split_special_tokens: Annotated[
        bool, flag("Read special tokens that stand in a text (<unk>) as ordinary text.", "What")
    ] = False,
    limit: Annotated[
        Optional[int],
        flag(
            "Random sample of each task and text. Default: all.",
            "What",
            hint=int,
            least=2,
            allowed="an interval takes at least 2 items",
        ),
    ] = None,
    sample_seed: SampleSeed = 0,
    seed: Annotated[
        str, flag("lm-eval's seeds: one, or Python's, numpy's, torch's and that of the examples.", "Evaluation")
    ] = "0,1234,1234,1234",
    batch_size: Annotated[int, flag("Texts that are generated at once.", "Scoring", hint=int, least=1)] = 8,
    context_length: Annotated[
        Optional[int], flag("Most tokens read at once. Default: as the model, at most 2048, or its run.", "Scoring")
    ] = None,
    stride: Annotated[
        Optional[int], flag("Tokens scored per window of a text. Default: --context-length.", "Scoring")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn_implementation: AttnImplementation = None,
    batch_tokens: BatchTokens = None,
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[
        Optional[Path], flag("A new .jsonl file of records, or a new folder with results.json, too.", "Output")
    ] = None,
    log_samples: Annotated[bool, flag("Write lm-eval's own files to --out, too.", "Output")] = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Score a model on lm-eval tasks and on texts; every figure has an interval over its items or documents."""
    names, texts = list(dict.fromkeys(parse_names(tasks))), list(dict.fromkeys(corpus or []))
    if not names and not texts:
        raise PreskipError("nothing to evaluate: give --tasks lambada_openai,... or --corpus TEXT")
    of_texts = ("stride", "text_column", "corpus_split")
    needs = {
        for_other("--tasks"): (bool(names), ("seed", "batch_size")),
        for_other("--corpus"): (bool(texts), of_texts),
    }
    refuse_unused(evaluate, locals(), needs)
    if adapter is not None and not adapter.is_dir():
        raise PreskipError(f"--adapter {adapter}: no such folder; give one saved with save_pretrained")
    if out is not None and out.exists():
        raise PreskipError(f"{out} exists already: choose another --out")
    settings, seeds = TaskSettings.from_options(given), _seeds(seed)
    settings.check_special_tokens(split_special_tokens)
    if given and not names:
        raise PreskipError(f"--{next(iter(given)).replace('_', '-')} {for_other('--tasks')}")
    if log_samples and (not names or out is None or out.suffix == ".jsonl"):
        raise PreskipError("--log-samples needs --tasks, and a folder as --out")
    from preskip.experiment.preflight import check_inputs, check_place

    if out is not None:
        check_place(out)
    where: dict[str, Any] = {"data_dir": data_dir, "model": model, "include_path": settings.include_path}
    check_inputs(texts, names, **where, scored_only=True)
    from preskip.progress import progress_bar, say, spinner

    with loading_libraries(quiet=as_json):
        from preskip.data.blocks import check_vocabulary
        from preskip.data.local import data_directory
        from preskip.evaluate.adapters import load_tokenizer_of
        from preskip.evaluate.likelihood import check_causal
        from preskip.evaluate.texts import TextSuite
        from preskip.runs import environment
        from preskip.runs.stored import failed_notes
        from preskip.runs.weights import trained_context
        from preskip.stats import summarise
    device = environment.resolve_device(device)
    dtype, reason = environment.resolve_dtype(dtype, device)
    with spinner(f"loading {model}", quiet=as_json):
        tokenizer = load_tokenizer_of(model, adapter, trust_remote_code, split_special_tokens=split_special_tokens)
        live = _load(model, adapter, dtype, device, attn_implementation, trust_remote_code)
    check_vocabulary(live, tokenizer)
    check_causal(live)
    config: Any = live.config
    own = getattr(config.get_text_config(), "max_position_embeddings", None)
    trained = trained_context(Path(model))  # of a run from scratch, whose blocks begin anywhere in a document
    length = chosen_context(context_length, own, trained or LONGEST_CONTEXT)
    text_suite = TextSuite(
        texts,
        tokenizer,
        context_length=length,
        stride=stride,
        limit=limit,
        seed=sample_seed,
        data_dir=data_directory(data_dir),
        text_column=text_column,
        split=corpus_split,
        reopen=trained is None,
        progress=not as_json,
    )
    if single := next((name for name, described in text_suite.sets.items() if described["documents"] < 2), None):
        raise PreskipError(
            f"text {single} is one document, an interval needs 2 or more: give more text, or a .jsonl file with a text "
            "in every line"
        )
    with spinner("preparing the tasks", quiet=as_json):
        task_suite = None
        if names:
            from preskip.evaluate.tasks import TaskSuite

            task_suite = TaskSuite(
                names,
                tokenizer,
                data_dir=data_dir,
                limit=limit,
                seed=sample_seed,
                context_length=length,
                settings=settings,
                seeds=seeds,
            )
    task_sets = task_suite.sets if task_suite else {}
    if shared := text_suite.sets.keys() & task_sets.keys():
        raise PreskipError(f"a text and a task are both named {min(shared)!r}: rename the text's file")
    facts = {
        "model": model,
        "adapter": None if adapter is None else str(adapter),
        **_dtypes(live, adapter),
        "device": device,
        "context_length": length,
        "stride": length if stride is None else stride,
        **({"split_special_tokens": True} if split_special_tokens else {}),
    }
    for line in _announcement(facts, reason):
        say(line, quiet=as_json)

    started = time.perf_counter()
    aggregated: dict[str, dict[str, float]] = {}
    before = text_suite.size
    with progress_bar("score", before + (task_suite.size if task_suite else 0), quiet=as_json) as advance:
        records = text_suite.score(live, batch_tokens=batch_tokens, advance=advance)
        if task_suite is not None:
            scores = task_suite.evaluate(
                live,
                batch_tokens=batch_tokens,
                batch_size=batch_size,
                bootstrap_iters=_BOOTSTRAP if log_samples else 0,
                advance=lambda done, note: advance(before + done, note),
            )
            records += scores.records
            aggregated = scores.metrics
    notes: list[str] = []
    metrics = summarise(records, notes=notes)
    notes += failed_notes(records)
    for name, described in (text_suite.sets | task_sets).items():
        notes += [f"{name}: {note}" for note in described.get("notes", ())]
    results = {
        **facts,
        "seconds": round(time.perf_counter() - started, 2),
        "environment": environment.describe(device),
        "sets": {**text_suite.sets, **task_sets},
        "metrics": metrics,
        "lm_eval": aggregated,
        **({"notes": notes} if notes else {}),
    }
    if named := {name: value for name, value in asdict(settings).items() if value not in (None, False)}:
        results["task_settings"] = named
    try:
        if out is not None and log_samples:
            from preskip.evaluate.lm_eval_files import write_lm_eval_files

            about = {"batch_size": batch_size, "device": device, "limit": limit, "bootstrap_iters": _BOOTSTRAP}
            about |= dict(zip(("random_seed", "numpy_seed", "torch_seed", "fewshot_seed"), seeds, strict=True))
            about |= {"model_num_parameters": facts["parameters"], "model_dtype": facts["dtype"]}
            write_lm_eval_files(
                out, scores.lm_eval, tokenizer, model=model, adapter=facts["adapter"], settings=settings, about=about
            )
        if out is not None:
            _write(out, records, results)
    except Exception:  # the scores took long: they are shown; stdout keeps to one JSON document
        _print(results, None, stderr=True)
        raise
    if as_json:
        print(json.dumps({"out": out and str(out), **results}, indent=1))
    else:
        _print(results, out)


def _load(name: str, adapter: Path | None, dtype: str, device: str, attention: str | None, trust: bool) -> nn.Module:
    import torch

    from preskip.assets import load_model
    from preskip.evaluate.adapters import load_adapter

    base = load_model(name, getattr(torch, dtype), device, attention, trust)
    return base if adapter is None else load_adapter(base, adapter)


def _seeds(text: str) -> tuple[int, int, int, int]:
    """As lm-eval reads them: one number for all generators, or four."""
    parts = parse_names(text)
    if len(parts) not in (1, 4) or not all(part.isdecimal() and int(part) < 2**32 for part in parts):
        raise PreskipError(f"--seed {text!r} is not possible: give one number, or four as in 0,1234,1234,1234")
    python, numpy, torch, fewshot = map(int, parts * (4 // len(parts)))
    return python, numpy, torch, fewshot


def _dtypes(model: Any, adapter: Path | None) -> dict[str, Any]:
    """What the weights of the base and of the adapter really are, and how attention is computed."""
    from preskip.adapter import base_model
    from preskip.assets import weights_dtype
    from preskip.evaluate.adapters import brought_weights
    from preskip.quantizing import packed_weights

    base = base_model(model)
    own = {id(parameter) for parameter in base.parameters()}
    adapted = [parameter for name, parameter in model.named_parameters() if _is_adapter(model, name)]
    adapted += [] if adapter is None else brought_weights(model, adapter)
    return {
        "dtype": weights_dtype(base),
        "adapter_dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in adapted})) or None,
        "attn_implementation": base.config._attn_implementation,
        # Of packed matrices what they stand for; prompt learning keeps its weights beside the base.
        "parameters": base.num_parameters()
        + packed_weights(base)
        + sum(p.numel() for p in model.parameters() if id(p) not in own),
        "adapter_parameters": sum(parameter.numel() for parameter in adapted),
    }


def _is_adapter(model: Any, name: str) -> bool:
    if not hasattr(model, "peft_config"):
        return False
    prefix = getattr(model.base_model, "prefix", None)  # prompt learning has none
    return (prefix is not None and prefix in name) or "prompt_encoder." in name or "modules_to_save." in name


def _announcement(facts: Mapping[str, Any], reason: str) -> list[str]:
    adapter = "no adapter"
    if facts["adapter"]:
        adapter = f"adapter {facts['adapter']} ({facts['adapter_parameters']:,} weights, {facts['adapter_dtype']})"
    return [
        f"model {facts['model']}, {adapter}",
        f"base weights {facts['dtype']} ({reason}), attention {facts['attn_implementation']}, {facts['device']}",
        f"context {facts['context_length']} tokens, stride {facts['stride']} on texts",
    ]


def _write(out: Path, records: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> None:
    from preskip.runs.files import write_json, write_jsonl

    if out.suffix == ".jsonl":
        write_jsonl(out, records)
        return
    write_jsonl(out / "items.jsonl", records)
    write_json(out / "results.json", results)  # last: it marks the folder as complete


def _print(results: Mapping[str, Any], out: Path | None, *, stderr: bool = False) -> None:
    from preskip.cli.printing import columns, print_table
    from preskip.report.words.verdicts import interval_text

    table = columns("set", "metric", right=("value", "95 % interval", "units"))
    for name, description in results["sets"].items():
        units = f"{description.get('documents', description.get('items')):,} {description['kind']}s"
        shown = name
        own = results["metrics"][name]
        # lm-eval's own figures have no interval.
        theirs = results["lm_eval"].get(name, {})
        others = {metric: {"value": value} for metric, value in theirs.items() if metric not in own}
        for metric, value in (own | others).items():
            text = interval_text(metric, value) or {"value": "–", "interval": ""}
            table.add_row(shown, metric, text["value"], text["interval"], units)
            shown, units = "", ""
    for name in results["lm_eval"].keys() - results["sets"].keys():
        for metric, number in results["lm_eval"][name].items():
            text = interval_text(metric, {"value": number}) or {"value": "–"}
            table.add_row(f"group {name}", metric, text["value"], "", "")
    note = (
        f"intervals over items or documents; texts with {results['context_length']} tokens of context, "
        f"stride {results['stride']}; {results['seconds']:g} s"
    )
    lines = [] if out is None else [f"records: {out}"]
    print_table(table, [note, *results.get("notes", ())], lines, stderr=stderr)
