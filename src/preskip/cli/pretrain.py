"""`preskip pretrain`: train an architecture from scratch, with and without the branch, beside its controls."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preskip.cli.runs import default_out, follow, kept_for_resuming, refuse_other_options, write_report
from preskip.errors import PreskipError
from preskip.experiment.parse import parse_names, parse_seeds

if TYPE_CHECKING:
    from preskip.arms.plan import Plan
    from preskip.experiment.pretrain_options import PretrainConfig

WHAT, MODEL, TRAINING, BRANCH, EVALUATION, OUTPUT = "What", "Model", "Training", "Branch", "Evaluation", "Output"
# Options that become fields of the architecture's config.
SIZES = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
}
# Options that say how and where, not what: they may stand beside --resume.
FREE = ("resume", "as_json", "workers", "executor", "ray_address")


def _option(name: str, panel: str, text: str) -> Any:
    return typer.Option(name, help=text, rich_help_panel=panel)


def pretrain(
    context: typer.Context,
    arch: Annotated[str, _option("--arch", MODEL, "pythia-70m, llama-1m, ...: a shape by name, or a config.json.")] = (
        "llama-1m"
    ),
    layers: Annotated[int | None, _option("--layers", MODEL, "Number of layers.")] = None,
    hidden_size: Annotated[int | None, _option("--hidden-size", MODEL, "Width of the model.")] = None,
    heads: Annotated[int | None, _option("--heads", MODEL, "Attention heads.")] = None,
    kv_heads: Annotated[int | None, _option("--kv-heads", MODEL, "Key-value heads.")] = None,
    mlp_width: Annotated[int | None, _option("--mlp-width", MODEL, "Inner width of the MLP.")] = None,
    fields: Annotated[
        list[str] | None, _option("--set", MODEL, "Any field of the config: tie_word_embeddings=true; repeatable.")
    ] = None,
    attn_implementation: Annotated[
        str | None, _option("--attn-implementation", MODEL, "eager, sdpa, ... Default: transformers' own.")
    ] = None,
    corpus: Annotated[
        str,
        _option(
            "--corpus", WHAT, "sotu, pydoc, wikitext2 or books (--data-dir), a text file, table or folder, a Hub id."
        ),
    ] = "sotu",
    data_dir: Annotated[
        str | None, _option("--data-dir", WHAT, "Folder of local data. Default: $PRESKIP_DATA, else ../shared/data.")
    ] = None,
    text_column: Annotated[
        str | None,
        _option("--text-column", WHAT, "Column of a table or Hub data set. Default: the one that holds text."),
    ] = None,
    corpus_split: Annotated[
        str, _option("--corpus-split", WHAT, "Split of a Hub data set or a folder of tables.")
    ] = "train",
    tokenizer: Annotated[
        str | None,
        _option("--tokenizer", WHAT, "A model's, a folder or a tokenizer.json. Default: one trained on the text."),
    ] = None,
    vocab_size: Annotated[int, _option("--vocab-size", WHAT, "Tokens of the tokenizer that is trained.")] = 2048,
    arms: Annotated[
        str,
        _option("--arms", WHAT, "base, base-wide, base-deep, base-flops, skip, preproj, preskip, parallel."),
    ] = "base,base-wide,base-flops,preskip",
    seeds: Annotated[str, _option("--seeds", WHAT, "Seeds of initialisation and data order, e.g. 1,2,3.")] = "1",
    tokens: Annotated[str, _option("--tokens", TRAINING, "Training tokens per arm, e.g. 5M.")] = "1M",
    repeat: Annotated[bool, _option("--repeat/--no-repeat", TRAINING, "Allow text to be read more than once.")] = False,
    batch_size: Annotated[int, _option("--batch-size", TRAINING, "Sequences per optimiser step.")] = 32,
    micro_batch_size: Annotated[
        int | None, _option("--micro-batch-size", TRAINING, "Sequences per forward pass. Default: --batch-size.")
    ] = None,
    seq_len: Annotated[int, _option("--seq-len", TRAINING, "Tokens per training sequence.")] = 128,
    lr: Annotated[
        list[str] | None, _option("--lr", TRAINING, "Peak learning rate: 3e-3, or preskip=2e-3; repeatable.")
    ] = None,
    branch_lr_factor: Annotated[
        float, _option("--branch-lr-factor", TRAINING, "Learning rate of the branch over that of the rest.")
    ] = 1.0,
    warmup_steps: Annotated[
        int | None, _option("--warmup-steps", TRAINING, "Steps of the warm-up. Default: a tenth.")
    ] = None,
    final_rate: Annotated[float, _option("--final-rate", TRAINING, "Last learning rate over the peak.")] = 0.1,
    weight_decay: Annotated[float, _option("--weight-decay", TRAINING, "Of matrices only.")] = 0.1,
    beta2: Annotated[float, _option("--beta2", TRAINING, "AdamW's second decay.")] = 0.95,
    max_grad_norm: Annotated[float, _option("--max-grad-norm", TRAINING, "Gradients are clipped to this.")] = 1.0,
    dtype: Annotated[str, _option("--dtype", TRAINING, "Compute in auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, _option("--device", TRAINING, "auto, cpu or cuda.")] = "auto",
    compile_model: Annotated[bool, _option("--compile/--no-compile", TRAINING, "torch.compile the model.")] = False,
    gradient_checkpointing: Annotated[
        bool, _option("--gradient-checkpointing", TRAINING, "Trade time for memory.")
    ] = False,
    log_steps: Annotated[int, _option("--log-steps", TRAINING, "Steps per line of train.jsonl.")] = 1,
    save_steps: Annotated[int, _option("--save-steps", TRAINING, "Steps between checkpoints.")] = 500,
    keep_checkpoints: Annotated[int, _option("--keep-checkpoints", TRAINING, "How many of the newest to keep.")] = 2,
    report_to: Annotated[
        str, _option("--report-to", TRAINING, "tensorboard, wandb, ... or none. Default: TensorBoard if installed.")
    ] = "auto",
    peak_flops: Annotated[
        float | None, _option("--peak-flops", TRAINING, "FLOP/s for the utilisation. Default: a measured product.")
    ] = None,
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
    init_weights: Annotated[str, _option("--init-weights", BRANCH, "identity or paper.")] = "paper",
    init_std: Annotated[float, _option("--init-std", BRANCH, "Standard deviation of W_up (and W_down).")] = 0.01,
    skip_init_std: Annotated[float, _option("--skip-init-std", BRANCH, "Standard deviation of W_skip.")] = 1e-4,
    skip_position: Annotated[str, _option("--skip-position", BRANCH, "attention or residual.")] = "attention",
    eval_steps: Annotated[
        int, _option("--eval-steps", EVALUATION, "Steps between evaluations on development documents.")
    ] = 100,
    eval_blocks: Annotated[int, _option("--eval-blocks", EVALUATION, "Sequences of such an evaluation.")] = 64,
    heldout_fraction: Annotated[float, _option("--heldout-fraction", EVALUATION, "Share of documents held out.")] = 0.1,
    split_seed: Annotated[int, _option("--split-seed", EVALUATION, "Seed of that choice.")] = 0,
    context_length: Annotated[
        int | None, _option("--context-length", EVALUATION, "Most tokens of context. Default: --seq-len.")
    ] = None,
    eval_documents: Annotated[int, _option("--eval-documents", EVALUATION, "Held-out documents to score.")] = 50,
    eval_words: Annotated[int, _option("--eval-words", EVALUATION, "Words scored per document.")] = 400,
    eval_corpora: Annotated[
        str, _option("--eval-corpora", EVALUATION, "Texts no arm trains on, separated by commas: wikitext2:62x850.")
    ] = "",
    eval_batch_tokens: Annotated[
        int | None, _option("--eval-batch-tokens", EVALUATION, "Padded tokens per forward pass while scoring.")
    ] = None,
    trust_remote_code: Annotated[
        bool, _option("--trust-remote-code", WHAT, "Let code of the tokenizer's repository run.")
    ] = False,
    workers: Annotated[int, _option("--workers", OUTPUT, "Processes that train arms and seeds side by side.")] = 1,
    executor: Annotated[
        str, _option("--executor", OUTPUT, "local, or ray: each arm and seed as a task of its own.")
    ] = "local",
    ray_address: Annotated[
        str | None, _option("--ray-address", OUTPUT, "Ray cluster, e.g. auto. Default: one on this machine.")
    ] = None,
    out: Annotated[
        Path | None, _option("--out", OUTPUT, "Run directory; must not exist. Default: runs/<time>-<arch>-<corpus>.")
    ] = None,
    resume: Annotated[
        Path | None, _option("--resume", OUTPUT, "Finish this run; every other option comes from it.")
    ] = None,
    as_json: Annotated[bool, _option("--json", OUTPUT, "Print results as JSON, without progress.")] = False,
) -> None:
    """Train an architecture from scratch with Preskip, beside plain models of equal weights and of equal compute.

    Without arguments it trains four arms of about a million weights on the embedded corpus.
    """
    options = {name: value for name, value in locals().items() if name not in ("context", "out", *FREE)}
    from preskip.train.cluster import check_executor
    from preskip.train.distributed import is_main, share_batch, world_size

    if not is_main():
        from preskip.progress import quiet_libraries

        quiet_libraries()
        from preskip.experiment.run import follow_run

        follow(follow_run, device, resume)
        return
    if resume is not None:
        refuse_other_options(context, FREE)
    check_executor(executor, ray_address)
    if workers < 1:
        raise PreskipError(f"--workers {workers} is not possible: it must be at least 1")
    if workers > 1 and (executor == "ray" or world_size() > 1):
        raise PreskipError("--workers has its own processes: leave out --executor ray, torchrun or accelerate launch")
    config = _config(options) if resume is None else None
    if config is not None:
        share_batch(config.batch_size, config.micro_batch)
    from preskip.progress import spinner

    with spinner("loading libraries", quiet=as_json):
        from preskip.progress import quiet_libraries

        quiet_libraries()
        from preskip.experiment.run import finish_run, start_run
        from preskip.runs.directory import RunDirectory

    if config is not None:
        run = start_run(config, out or default_out(Path(config.arch).stem, config.corpus), ["preskip", *sys.argv[1:]])
    else:
        assert resume is not None
        run = RunDirectory.open(resume)
    if not as_json:
        _announce(run)
    with kept_for_resuming(run, "pretrain", is_new=resume is None):
        results = finish_run(
            run,
            "pretrain",
            quiet=as_json,
            workers=workers,
            executor=executor,
            ray_address=ray_address,
            show_plans=(lambda plans: None) if as_json else print_plans,
        )
    page = write_report(run, as_json)
    if as_json:
        print(json.dumps({"run": str(run.path), "report": page and str(page), **results}, indent=1))
    else:
        from preskip.cli.tables import print_results

        print_results(results, run.path, page)


def print_plans(plans: Mapping[str, Plan]) -> None:
    """Print what is trained: weights, compute and tokens of every arm, and how near it comes to preskip's."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from preskip.cli.wide import print_wide

    table = Table(header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    headings = ("layers", "MLP", "weights", "non-emb.", "MFLOP/token", "tokens", "steps", "training PFLOP")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("against preskip", no_wrap=True)
    for name, plan in plans.items():
        matched = f"{plan.matched} {plan.deviation:+.2%}" if plan.matched and plan.deviation is not None else "–"
        table.add_row(
            name,
            str(plan.config.num_hidden_layers),
            str(plan.mlp_width),
            f"{plan.size.parameters:,}",
            f"{plan.size.non_embedding:,}",
            f"{plan.size.flops_per_token / 1e6:,.2f}",
            f"{plan.tokens:,}",
            f"{plan.steps:,}",
            f"{plan.training_flops / 1e15:,.3g}",
            matched,
        )
    print_wide(Console(stderr=True), table)


def _config(options: dict[str, Any]) -> PretrainConfig:
    from dataclasses import fields

    from preskip.branch import BranchSettings
    from preskip.experiment.pretrain_options import PretrainConfig, parse_overrides, parse_rates, parse_tokens

    options = dict(options)
    overrides = parse_overrides(options.pop("fields") or [])
    sizes = {name: options.pop(name) for name in SIZES}
    overrides |= {SIZES[name]: value for name, value in sizes.items() if value is not None}
    everyone, by_arm = parse_rates(options.pop("lr") or [])
    if everyone is not None:
        options["learning_rate"] = everyone
    settings = {field.name: options.pop(field.name) for field in fields(BranchSettings)}
    options |= {name: parse_names(options[name]) for name in ("arms", "eval_corpora", "report_to")}
    return PretrainConfig(
        settings=BranchSettings(**settings),
        overrides=overrides,
        learning_rates=by_arm,
        branch_rate_factor=options.pop("branch_lr_factor"),
        compile=options.pop("compile_model"),
        tokens=parse_tokens(options.pop("tokens")),
        seeds=parse_seeds(options.pop("seeds")),
        **options,
    )


def _announce(run: Any) -> None:
    from preskip.progress import say

    config = run.manifest["config"]
    say(f"architecture {config['arch']}, corpus {config['corpus']}, {config['device']}")
    say(f"weights float32, computed in {config['dtype']}")
    say(f"run {run.path}")
