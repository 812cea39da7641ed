"""One probe from start to report: load, train every arm and seed, evaluate, compare.

Each arm and seed is a cell of the run directory. A finished cell is never computed again; an unfinished one continues
from its last checkpoint, so that an interrupted run ends with the result of an uninterrupted one.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import set_seed

from preskip import environment
from preskip.adapter import PreskipConfig
from preskip.analysis.depth import depth_profile
from preskip.arms import Arm, ArmContext, attention_paths, branch_parameters, resolve_arms
from preskip.assets import EMBEDDED_MODELS, load_model, load_tokenizer, resolve_model
from preskip.data.blocks import Window, pack_blocks
from preskip.data.corpus import EMBEDDED_CORPORA, Document, load_corpus, split_documents
from preskip.data.last_word import LastWordItem, build_items
from preskip.errors import PreskipError
from preskip.evaluate.likelihood import (
    check_causal,
    document_records,
    document_windows,
    last_word_records,
    last_word_windows,
    score_sequences,
)
from preskip.probe.config import ProbeConfig
from preskip.probe.results import summarise_run
from preskip.progress import progress_bar, progress_display, say, spinner
from preskip.rundir import Cell, RunDirectory, clear_disk_errors, write_json, write_jsonl
from preskip.train.frozen import TrainingSettings, train_frozen
from preskip.train.memory import peak_memory
from preskip.version import __version__

# Training text is shuffled in pieces of about this many characters, so that a short training sees many documents.
PIECE_CHARACTERS = 4000
# Windows of held-out text on which the functional size of the branch is measured.
DEPTH_WINDOWS = 8


@dataclass(frozen=True)
class HeldOut:
    """What every arm is evaluated on, tokenised once."""

    documents: list[Document]
    windows: list[Window]
    owners: list[int]
    items: list[LastWordItem]
    item_windows: list[Window]


@dataclass(frozen=True)
class Bench:
    """Everything the cells of a run share; `blocks(seed)` gives the training blocks [N, seq_len] of every arm."""

    config: ProbeConfig
    base: nn.Module
    tokenizer: Any
    context: ArmContext
    blocks: Callable[[int], np.ndarray]
    heldout: HeldOut
    quiet: bool


def start_probe(config: ProbeConfig, out: Path, command: Sequence[str]) -> RunDirectory:
    """Create the run directory of a new run.

    Args:
        config: what to do.
        out: the run directory; must not exist.
        command: the command line, for the record.

    Raises:
        PreskipError: the path exists, or the device is not there; nothing has been written then.
    """
    if out.exists():
        raise PreskipError(f"{out} exists already: choose another --out, or finish it with --resume {out}")
    device = environment.resolve_device(config.device)
    dtype, _ = environment.resolve_dtype(config.dtype, device)
    manifest = {
        "preskip_version": __version__,
        "status": "running",
        "created": _now(),
        "finished": None,
        "command": list(command),
        "directory": str(Path.cwd()),
        "config": config.to_json() | {"dtype": dtype, "device": device},
    }
    return RunDirectory.create(out, manifest)


def run_probe(run: RunDirectory, *, quiet: bool = False) -> dict[str, Any]:
    """Do, or finish, what the run's run.json says.

    Returns:
        The content of results.json.

    Raises:
        PreskipError: bad input, NaN, a full disk; the run keeps what is done and can be resumed.
    """
    config = ProbeConfig.from_json(run.manifest["config"])
    started = time.perf_counter()
    try:
        bench, facts = _prepare(config, Path(run.manifest.get("directory", ".")), quiet)
        _check_same_inputs(run, facts)
        say(_extent(facts["corpus"], bench.heldout), quiet=quiet)
        earlier = run.manifest.get("timings", {})
        run.update_manifest(status="running", **facts)
        seconds = {"load": time.perf_counter() - started, "train": 0.0, "evaluate": 0.0}
        for seed in config.seeds:
            for arm in resolve_arms(config.arms):
                # The untouched model has no training seed: evaluated once.
                if arm.make_config is None and seed != config.seeds[0]:
                    continue
                cell = run.cell(arm.name, seed)
                if cell.is_done:
                    cell.load()  # damaged files are found now, not after hours of training
                else:
                    summary = _run_cell(bench, arm, seed, cell)
                    seconds["train"] += summary["train_seconds"]
                    seconds["evaluate"] += summary["evaluate_seconds"]
        with spinner("comparing the arms", quiet=quiet):
            results = summarise_run(run, config)
        write_json(run.path / "results.json", results)
        seconds["total"] = time.perf_counter() - started
        timings = {name: round(earlier.get(name, 0.0) + value, 2) for name, value in seconds.items()}
        peak = max(arm["peak_memory_bytes"] for arm in results["arms"].values())
        arms = {
            name: {**described, "trainable_parameters": results["arms"][name]["trainable_parameters"]}
            for name, described in facts["arms"].items()
        }
        run.update_manifest(status="finished", finished=_now(), timings=timings, peak_memory_bytes=peak, arms=arms)
    except torch.OutOfMemoryError as error:
        _mark(run, "failed")
        raise PreskipError(
            f"out of memory ({str(error).splitlines()[0]}): lower --micro-batch-size or --eval-batch-tokens, or give "
            "--gradient-checkpointing"
        ) from error
    except BaseException as error:
        _mark(run, "interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed")
        raise
    return results


def _extent(corpus: dict[str, Any], heldout: HeldOut) -> str:
    """What is trained on and scored, in one line; a corpus that is read several times is worth knowing."""
    passes = corpus["training_passes"]
    return (
        f"training text {corpus['training_tokens']:,} tokens"
        + (f", each seen {passes:g} times" if passes > 1 else "")
        + f"; held out {len(heldout.documents)} documents, {len(heldout.items)} last-word items"
    )


def _mark(run: RunDirectory, status: str) -> None:
    """Record how a run ended; where even that cannot be written, the error that ended it matters more."""
    with suppress(PreskipError):
        run.update_manifest(status=status)


def _check_same_inputs(run: RunDirectory, facts: dict[str, Any]) -> None:
    """Cells of another model or corpus must not be compared with those still to come."""
    for part in ("model", "corpus"):
        before = run.manifest.get(part, {}).get("sha256")
        if before is not None and before != facts[part]["sha256"]:
            raise PreskipError(
                f"{part} {facts[part]['name']} has changed since this run began (its SHA-256 was {before[:12]}...): "
                "put the old one back, or start a new run"
            )


def _found(name: str, directory: Path) -> str:
    """A model's or corpus's name; a path that does not exist here is one of the folder the run was started in."""
    path = directory / name
    is_embedded = name in EMBEDDED_MODELS or name in EMBEDDED_CORPORA
    return str(path) if path.exists() and not Path(name).exists() and not is_embedded else name


def _prepare(config: ProbeConfig, directory: Path, quiet: bool) -> tuple[Bench, dict[str, Any]]:
    model_name, corpus_name = _found(config.model, directory), _found(config.corpus, directory)
    corpus = load_corpus(corpus_name, text_column=config.text_column, split=config.corpus_split, progress=not quiet)
    split = split_documents(corpus, config.heldout_fraction, config.split_seed)
    source = resolve_model(model_name)
    with spinner(f"loading {config.model}", quiet=quiet):
        tokenizer = load_tokenizer(model_name, trust_remote_code=config.trust_remote_code)
        base = load_model(
            model_name,
            dtype=getattr(torch, config.dtype),
            device=config.device,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    check_causal(base)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    longest = max(config.seq_len, config.context_length)
    if limit is not None and longest > limit:
        raise PreskipError(f"{longest} tokens exceed the model's context of {limit}: lower --seq-len/--context-length")
    targets = attention_paths(base, config.layers, config.target_modules, config.exclude_modules)
    context = ArmContext(
        base=base,
        settings=config.settings,
        skip_position=config.skip_position,
        layers=config.layers,
        targets=tuple(targets),
        by_name=config.target_modules is not None or config.exclude_modules is not None,
        budget=branch_parameters(base, config.settings, targets),
    )
    with spinner("preparing the held-out texts", quiet=quiet):
        heldout = _heldout(config, split.heldout, tokenizer, limit)
    wanted = config.steps * config.batch_size * config.seq_len

    @lru_cache(maxsize=1)
    def blocks_of(seed: int) -> np.ndarray:
        with progress_display("tokenise training text", quiet=quiet) as progress:
            return pack_blocks(
                split.training,
                tokenizer,
                config.seq_len,
                limit_tokens=wanted,
                seed=seed,
                piece_characters=PIECE_CHARACTERS,
                min_blocks=config.batch_size,
                progress=progress,
            )

    bench = Bench(config, base, tokenizer, context, blocks_of, heldout, quiet)
    blocks = blocks_of(config.seeds[0])
    facts = {
        "model": {
            "name": config.model,
            "type": base.config.model_type,
            "parameters": sum(parameter.numel() for parameter in base.parameters()),
            "layers": base.config.get_text_config().num_hidden_layers,
            "hidden_size": base.config.get_text_config().hidden_size,
            "dtype": config.dtype,
            "attn_implementation": base.config._attn_implementation,
            "source": source.source,
            "sha256": source.sha256,
            "revision": source.revision,
        },
        "corpus": {
            "name": config.corpus,
            "training_documents": len(split.training),
            "training_tokens": int(blocks.size),
            "training_passes": round(wanted / blocks.size, 2),
            "heldout_documents": len(split.heldout),
            "source": corpus.source,
            "sha256": corpus.sha256,
        },
        "environment": environment.describe(config.device),
        "arms": {arm.name: _arm_facts(arm, context, config) for arm in resolve_arms(config.arms)},
        "seeds": list(config.seeds),
    }
    return bench, facts


def _heldout(config: ProbeConfig, documents: Sequence[Document], tokenizer: Any, limit: int | None) -> HeldOut:
    """Choose and tokenise what is scored; items longer than the model's context of `limit` tokens are left out."""
    generator = np.random.default_rng(config.split_seed)
    chosen = sorted(generator.permutation(len(documents))[: config.eval_documents])
    if len(chosen) < 2:
        raise PreskipError(
            f"corpus {config.corpus} has 1 held-out document, an interval needs 2 or more: raise "
            "--heldout-fraction, or give more documents"
        )
    scored = [_beginning(documents[index], config.eval_words) for index in chosen]
    windows, owners = document_windows(
        scored, tokenizer, context_length=config.context_length, stride=config.context_length
    )
    items, item_windows = _last_words(config, documents, tokenizer, limit) if config.last_word_items else ([], [])
    return HeldOut(scored, windows, owners, items, item_windows)


def _last_words(
    config: ProbeConfig, documents: Sequence[Document], tokenizer: Any, limit: int | None
) -> tuple[list[LastWordItem], list[Window]]:
    try:
        items = build_items(documents, config.last_word_items, config.split_seed)
        windows = last_word_windows(items, tokenizer)
    except PreskipError as error:
        raise PreskipError(f"{error} (--last-word-items 0)") from None
    fitting = [
        pair for pair in zip(items, windows, strict=True) if limit is None or len(pair[1].input_ids) <= limit + 1
    ]
    if len({item.document for item, _ in fitting}) < 2:
        raise PreskipError(
            "the last-word items that fit the model's context come from fewer than 2 held-out documents: give more text"
            " or leave them out (--last-word-items 0)"
        )
    return [item for item, _ in fitting], [window for _, window in fitting]


def _beginning(document: Document, words: int) -> Document:
    """The first words of a document, its white space kept."""
    end = 0
    for _ in range(words):
        while end < len(document.text) and document.text[end].isspace():
            end += 1
        while end < len(document.text) and not document.text[end].isspace():
            end += 1
    return Document(document.id, document.text[:end], document.group)


def _arm_facts(arm: Arm, context: ArmContext, config: ProbeConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if arm.make_config is not None:
        described = arm.make_config(context).to_dict()
        kept = ("r", "lora_alpha", "layers_to_transform", "skip_position", *asdict(context.settings))
        settings = {key: described[key] for key in kept if described.get(key) is not None}
    return {
        "description": arm.description,
        "learning_rate": config.learning_rate(arm.name),
        "adapter_dtype": None if arm.make_config is None else "float32",
        "settings": settings,
    }


def _run_cell(bench: Bench, arm: Arm, seed: int, cell: Cell) -> dict[str, Any]:
    config = bench.config
    device = next(bench.base.parameters()).device
    label = arm.name if len(config.seeds) == 1 or arm.make_config is None else f"{arm.name} seed {seed}"
    blocks = bench.blocks(seed)
    rows: list[dict[str, Any]] = []
    depth: list[dict[str, Any]] = []
    trainable, model = 0, bench.base
    started = time.perf_counter()
    with clear_disk_errors(cell.folder):
        cell.folder.mkdir(parents=True, exist_ok=True)
    try:
        with peak_memory(device) as peak:
            if arm.make_config is not None:
                model, trainable = _insert(bench, arm, seed)
                with progress_bar(f"train {label}", config.steps, quiet=bench.quiet) as advance:
                    rows = train_frozen(
                        model,
                        blocks,
                        _training_settings(config, arm, seed),
                        arm=arm.name,
                        checkpoints=cell.checkpoints,
                        log=cell.train_log,
                        advance=advance,
                    )
                with clear_disk_errors(cell.adapter):
                    model.save_pretrained(str(cell.adapter))  # type: ignore[operator]
            trained = time.perf_counter()
            items = _evaluate(bench, model, label)
        if isinstance(getattr(model, "peft_config", {}).get("default"), PreskipConfig):
            windows = [window.input_ids[:-1] for window in bench.heldout.windows[:DEPTH_WINDOWS]]
            depth = depth_profile(model.get_base_model(), windows)  # type: ignore[operator]
    finally:
        if model is not bench.base:
            model.unload()  # type: ignore[operator]
    seconds = [row["seconds"] for row in rows]
    summary = {
        "arm": arm.name,
        "seed": seed,
        "trainable_parameters": trainable,
        "learning_rate": config.learning_rate(arm.name),
        "steps": len(rows),
        "final_training_loss": rows[-1]["loss"] if rows else None,
        "seconds_per_step": float(np.median(seconds)) if seconds else None,
        "peak_memory_bytes": peak.bytes,
        "train_seconds": round(trained - started, 2),
        "evaluate_seconds": round(time.perf_counter() - trained, 2),
        "depth": depth,
    }
    write_jsonl(cell.items, items)
    write_json(cell.summary, summary)
    shutil.rmtree(cell.checkpoints, ignore_errors=True)
    return summary


def _insert(bench: Bench, arm: Arm, seed: int) -> tuple[nn.Module, int]:
    """Put an arm's adapter into the base, initialised from the seed; check its budget and dtype."""
    from peft import get_peft_model

    assert arm.make_config is not None
    set_seed(seed)
    model = get_peft_model(bench.base, arm.make_config(bench.context))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in trainable)
    if arm.matched and abs(count - bench.context.budget) > 0.005 * bench.context.budget:
        raise PreskipError(f"arm {arm.name} trains {count:,} parameters, the budget is {bench.context.budget:,}")
    if any(parameter.dtype != torch.float32 for parameter in trainable):
        raise PreskipError(f"arm {arm.name} would train weights that are not float32")
    return model, count


def _training_settings(config: ProbeConfig, arm: Arm, seed: int) -> TrainingSettings:
    learning_rate = config.learning_rate(arm.name)
    assert learning_rate is not None
    return TrainingSettings(
        steps=config.steps,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch,
        learning_rate=learning_rate,
        seed=seed,
        gradient_checkpointing=config.gradient_checkpointing,
        save_steps=config.save_steps,
    )


def _evaluate(bench: Bench, model: nn.Module, label: str) -> list[dict[str, Any]]:
    heldout = bench.heldout
    windows = [*heldout.windows, *heldout.item_windows]
    with progress_bar(f"evaluate {label}", len(windows), quiet=bench.quiet) as advance:
        scores = score_sequences(model, windows, batch_tokens=bench.config.eval_batch_tokens, advance=advance)
    document_scores, item_scores = scores[: len(heldout.windows)], scores[len(heldout.windows) :]
    return [
        *document_records(heldout.documents, heldout.owners, document_scores, bench.tokenizer),
        *last_word_records(heldout.items, item_scores),
    ]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
