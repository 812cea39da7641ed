"""`preskip probe`: insert, train frozen, evaluate, compare, report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preskip.cli.runs import default_out, follow, kept_for_resuming, refuse_other_options, write_report
from preskip.errors import PreskipError
from preskip.experiment.parse import parse_names, parse_seeds

if TYPE_CHECKING:
    from preskip.experiment.probe_options import ProbeConfig

WHAT, TRAINING, BRANCH, EVALUATION, OUTPUT = "What", "Training", "Branch", "Evaluation", "Output"
# Options that say how and where, not what: they may stand beside --resume.
FREE = ("resume", "as_json", "executor", "ray_address")


def _option(name: str, panel: str, text: str) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel)


def probe(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="smollm2 (embedded), a Hub id, a folder, a GGUF file.")] = "smollm2",
    preset: Annotated[
        str, _option("--preset", WHAT, "quick, standard or paper: where the other options start from.")
    ] = "quick",
    corpus: Annotated[
        str,
        _option(
            "--corpus", WHAT, "sotu, pydoc, wikitext2 or books (--data-dir), a text file, table or folder, a Hub id."
        ),
    ] = "sotu",
    data_dir: Annotated[
        str | None,
        _option("--data-dir", WHAT, "Folder of local data. Default: $PRESKIP_DATA, else ../shared/data."),
    ] = None,
    text_column: Annotated[
        str | None,
        _option("--text-column", WHAT, "Column of a table or Hub data set. Default: the one that holds text."),
    ] = None,
    corpus_split: Annotated[
        str, _option("--corpus-split", WHAT, "Split of a Hub data set or a folder of tables.")
    ] = "train",
    arms: Annotated[str, _option("--arms", WHAT, "What to compare, separated by commas.")] = "none,preskip,lora",
    seeds: Annotated[str, _option("--seeds", WHAT, "Training seeds, separated by commas.")] = "42",
    match: Annotated[
        str, _option("--match", WHAT, "What arms have in common: params, flops, or none (with --lora-rank).")
    ] = "params",
    lora_rank: Annotated[
        list[str] | None,
        _option("--lora-rank", WHAT, "For --match none: 480, 0.625 of the width, preproj+lora=64; repeatable."),
    ] = None,
    lora_scale: Annotated[float, _option("--lora-scale", WHAT, "LoRA's alpha over its rank; not of rslora.")] = 1.0,
    layers: Annotated[str | None, _option("--layers", WHAT, "Layers to adapt, e.g. 0-5,10. Default: all.")] = None,
    target_modules: Annotated[
        str | None, _option("--target-modules", WHAT, "Regular expression of the attentions to adapt.")
    ] = None,
    exclude_modules: Annotated[
        str | None, _option("--exclude-modules", WHAT, "Regular expression of the attentions to leave out.")
    ] = None,
    dtype: Annotated[str, _option("--dtype", WHAT, "Base weights: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, _option("--device", WHAT, "auto, cpu or cuda.")] = "auto",
    attn_implementation: Annotated[
        str | None, _option("--attn-implementation", WHAT, "eager, sdpa, ... Default: transformers' own.")
    ] = None,
    trust_remote_code: Annotated[
        bool, _option("--trust-remote-code", WHAT, "Let code of the model's repository run.")
    ] = False,
    steps: Annotated[int, _option("--steps", TRAINING, "Optimiser steps.")] = 16,
    batch_size: Annotated[int, _option("--batch-size", TRAINING, "Sequences per optimiser step.")] = 8,
    micro_batch_size: Annotated[
        int | None, _option("--micro-batch-size", TRAINING, "Sequences per forward pass. Default: --batch-size.")
    ] = None,
    seq_len: Annotated[int, _option("--seq-len", TRAINING, "Tokens per training sequence.")] = 128,
    lr: Annotated[
        list[str] | None, _option("--lr", TRAINING, "Peak learning rate: 3e-4, preskip=1e-3, or tune; repeatable.")
    ] = None,
    tune_seed: Annotated[int, _option("--tune-seed", TRAINING, "Seed of the trainings of --lr tune.")] = 0,
    development_documents: Annotated[
        int, _option("--development-documents", TRAINING, "Documents per corpus that --lr tune chooses on.")
    ] = 24,
    development_words: Annotated[int, _option("--development-words", TRAINING, "Words of each of these.")] = 100,
    packing: Annotated[str, _option("--packing", TRAINING, "packed, or paragraphs (the paper's).")] = "packed",
    gradient_checkpointing: Annotated[
        bool, _option("--gradient-checkpointing", TRAINING, "Trade time for memory.")
    ] = False,
    save_steps: Annotated[int, _option("--save-steps", TRAINING, "Steps between checkpoints.")] = 50,
    expansion: Annotated[float, _option("--expansion", BRANCH, "Inner width over the model's width.")] = 1.25,
    activation: Annotated[str, _option("--activation", BRANCH, "silu, gelu, relu or mish.")] = "silu",
    gated: Annotated[bool, _option("--gated/--no-gated", BRANCH, "SwiGLU-like pre-projection.")] = False,
    dropout: Annotated[float, _option("--dropout", BRANCH, "Dropout on inner features.")] = 0.0,
    preprojection: Annotated[
        bool, _option("--preprojection/--no-preprojection", BRANCH, "With or without pre-projection.")
    ] = True,
    content_skip: Annotated[
        bool, _option("--content-skip/--no-content-skip", BRANCH, "With or without content skip.")
    ] = True,
    enrich_attention: Annotated[
        bool, _option("--enrich-attention/--no-enrich-attention", BRANCH, "Whether attention reads the features.")
    ] = True,
    skip_rank: Annotated[int | None, _option("--skip-rank", BRANCH, "Rank of the skip. Default: full.")] = None,
    init_weights: Annotated[str, _option("--init-weights", BRANCH, "identity or paper.")] = "identity",
    init_std: Annotated[float, _option("--init-std", BRANCH, "Standard deviation of W_up (and W_down).")] = 0.01,
    skip_init_std: Annotated[float, _option("--skip-init-std", BRANCH, "Standard deviation of W_skip.")] = 1e-4,
    skip_position: Annotated[str, _option("--skip-position", BRANCH, "attention or residual.")] = "attention",
    heldout_fraction: Annotated[float, _option("--heldout-fraction", EVALUATION, "Share of documents held out.")] = 0.2,
    split_seed: Annotated[int, _option("--split-seed", EVALUATION, "Seed of that choice.")] = 0,
    context_length: Annotated[int, _option("--context-length", EVALUATION, "Most tokens of context.")] = 256,
    eval_documents: Annotated[int, _option("--eval-documents", EVALUATION, "Held-out documents to score.")] = 50,
    eval_words: Annotated[int, _option("--eval-words", EVALUATION, "Words scored per document.")] = 140,
    last_word_items: Annotated[int, _option("--last-word-items", EVALUATION, "Last-word items; 0: none.")] = 80,
    tasks: Annotated[
        str, _option("--tasks", EVALUATION, "lm-eval tasks, separated by commas, e.g. lambada_openai,arc_easy.")
    ] = "",
    task_limit: Annotated[
        int | None, _option("--task-limit", EVALUATION, "Items per task, a fixed random sample. Default: all.")
    ] = None,
    eval_corpora: Annotated[
        str,
        _option("--eval-corpora", EVALUATION, "Texts no arm trains on, separated by commas: books,wikitext2:62x850."),
    ] = "",
    nulls: Annotated[str, _option("--nulls", EVALUATION, "Controls of the depth picture: noise,shuffled.")] = "",
    equal_step: Annotated[
        bool, _option("--equal-step/--no-equal-step", EVALUATION, "Train preskip once more with equal steps per layer.")
    ] = False,
    dtype_audit: Annotated[
        bool, _option("--dtype-audit/--no-dtype-audit", EVALUATION, "Score the untouched base in fp32 and bf16, too.")
    ] = False,
    ablation_documents: Annotated[
        int, _option("--ablation-documents", EVALUATION, "Documents on which each layer's parts are switched off.")
    ] = 0,
    paper_scoring: Annotated[
        bool, _option("--paper-scoring/--no-paper-scoring", EVALUATION, "Score by the paper's own protocol, too.")
    ] = False,
    eval_batch_tokens: Annotated[
        int | None,
        _option("--eval-batch-tokens", EVALUATION, "Padded tokens per forward pass. Default: by the device."),
    ] = None,
    executor: Annotated[
        str, _option("--executor", OUTPUT, "local, or ray: each arm and seed as a task of its own.")
    ] = "local",
    ray_address: Annotated[
        str | None, _option("--ray-address", OUTPUT, "Ray cluster, e.g. auto. Default: one on this machine.")
    ] = None,
    out: Annotated[
        Path | None, _option("--out", OUTPUT, "Run directory; must not exist. Default: runs/<time>-<model>-<corpus>.")
    ] = None,
    resume: Annotated[
        Path | None, _option("--resume", OUTPUT, "Finish this run; every other option comes from it.")
    ] = None,
    as_json: Annotated[bool, _option("--json", OUTPUT, "Print results as JSON, without progress.")] = False,
) -> None:
    """Insert Preskip into a frozen model, train it beside LoRA of the same size, and compare.

    Without arguments it runs the embedded model on the embedded corpus, in a few minutes on two cores.
    """
    options = {name: value for name, value in locals().items() if name not in ("context", "out", *FREE)}
    from preskip.train.distributed import is_main

    if not is_main():
        from preskip.progress import quiet_libraries

        quiet_libraries()
        from preskip.experiment.run import follow_run

        follow(follow_run, device, resume)
        return
    if resume is not None:
        refuse_other_options(context, FREE)
    from preskip.experiment.probe_options import ProbeConfig, parse_layers, parse_learning_rates, parse_lora_ranks

    config = None
    if resume is None:
        options = _with_preset(context, options)
        names = parse_names(options["arms"])
        rates = [text for text in options["lr"] or [] if text != "tune"]
        lr_mode = "tune" if "tune" in (options.pop("lr") or []) else "fixed" if rates else "default"
        options |= {
            "arms": names if "none" in names or not names else ("none", *names),
            "seeds": parse_seeds(options["seeds"]),
            "layers": parse_layers(layers),
            "learning_rates": parse_learning_rates(rates, names),
            "lora_ranks": parse_lora_ranks(options.pop("lora_rank") or []),
            "lr_mode": lr_mode,
            **{name: parse_names(options[name]) for name in ("tasks", "eval_corpora", "nulls")},
        }
        config = _config(ProbeConfig, options)
    from preskip.progress import spinner

    with spinner("loading libraries", quiet=as_json):
        from preskip.progress import quiet_libraries

        quiet_libraries()
        from preskip.experiment.run import finish_run, start_run
        from preskip.runs.directory import RunDirectory
        from preskip.train.cluster import check_executor

    check_executor(executor, ray_address)
    if config is not None:
        run = start_run(config, out or default_out(config.model, config.corpus), ["preskip", *sys.argv[1:]])
    else:
        assert resume is not None
        run = RunDirectory.open(resume)
    if not as_json:
        _announce(run, asked=None if config is None else config.dtype)
    with kept_for_resuming(run, "probe", is_new=resume is None):
        results = finish_run(run, "probe", quiet=as_json, executor=executor, ray_address=ray_address)
    page = write_report(run, as_json)
    if as_json:
        print(json.dumps({"run": str(run.path), "report": page and str(page), **results}, indent=1))
    else:
        from preskip.cli.tables import print_claims, print_paper, print_results

        print_results(results, run.path, page)
        print_paper(results)
        print_claims(run.manifest, results)
        if "dtype_audit" in results:
            from preskip.cli.audit import print_audit

            print_audit(results["dtype_audit"])


def _config(kind: type[ProbeConfig], options: dict[str, Any]) -> ProbeConfig:
    from dataclasses import fields

    from preskip.branch import BranchSettings

    settings = {field.name: options.pop(field.name) for field in fields(BranchSettings)}
    return kind(settings=BranchSettings(**settings), **options)


def _with_preset(context: typer.Context, options: dict[str, Any]) -> dict[str, Any]:
    """The options with the preset's values in place of those that the user did not give."""
    from preskip.experiment.presets import PRESETS

    name = options["preset"]
    if name not in PRESETS:
        raise PreskipError(f"--preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    values = PRESETS[name].options
    left_open = {
        key: value
        for key, value in values.items()
        if getattr(context.get_parameter_source(key), "name", "") != "COMMANDLINE"
    }
    return options | left_open


def _announce(run: Any, asked: str | None) -> None:
    """Say what runs on what; `asked` is the --dtype of a new run."""
    from preskip.progress import say
    from preskip.runs.environment import resolve_dtype

    config = run.manifest["config"]
    reason = "as before" if asked is None else resolve_dtype(asked, config["device"])[1]
    say(f"model {config['model']}, corpus {config['corpus']}, {config['device']}")
    say(f"base weights {config['dtype']} ({reason}), inserted weights float32")
    say(f"run {run.path}")
