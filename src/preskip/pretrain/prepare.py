"""What all cells of a run share, made once and kept in the run directory: tokenizer, packed text, held-out documents.

::

    RUN/tokenizer/              the tokenizer
    RUN/data/tokens.bin, .json  training text (`preskip.data.packed`)
    RUN/data/development.npy    blocks that are evaluated while training
    RUN/data/heldout.json       documents that are scored afterwards

A cell needs no more than the run directory, so that any process that sees it can train one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preskip.data.blocks import pack_blocks
from preskip.data.corpus import Document
from preskip.data.packed import PackedText, open_blocks, write_packed
from preskip.data.splits import Splits, choose, slug
from preskip.data.tokenizer import fingerprint, load_tokenizer, train_tokenizer
from preskip.errors import PreskipError
from preskip.evaluate.texts import TextSet, prepare_texts
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.pretrain.arms import Plan, plan_arms
from preskip.pretrain.corpora import (
    CHARACTERS_PER_TOKEN,
    amount_read,
    given_tokenizer,
    load_corpora,
    most_tokens,
    reading_limit,
)
from preskip.progress import progress_bar, spinner
from preskip.runs import environment
from preskip.runs.directory import RunDirectory
from preskip.runs.files import clear_disk_errors, read_json, write_json
from preskip.stats import ALPHA, DEFAULT_MARGINS

PIECE_CHARACTERS = 4000
# What preskip is declared against: the controls that tell what parameters and compute alone buy, and the plain model.
DECISIVE = ("base-wide", "base-flops", "base", "base-deep", "parallel")


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What a cell reads from the run directory.

    Attributes:
        config: every option.
        tokenizer: of all arms.
        plans: the arms, solved.
        blocks: training blocks [N, seq_len], memory-mapped.
        development: blocks that are evaluated while training, [M, seq_len].
        texts: what is scored.
    """

    config: PretrainConfig
    tokenizer: Any
    plans: dict[str, Plan]
    blocks: np.ndarray
    development: np.ndarray
    texts: list[TextSet]


def prepare(run: RunDirectory, config: PretrainConfig, quiet: bool) -> tuple[dict[str, Plan], dict[str, Any]]:
    """Make what cells share, as far as it is not there yet.

    Args:
        run: the run directory.
        config: every option.
        quiet: no progress.

    Returns:
        The solved arms, and the facts for run.json.

    Raises:
        PreskipError: anything that would fail later: corpora, tokenizer, architecture, too little text.
    """
    directory = Path(run.manifest.get("directory", "."))
    limit = reading_limit(config, most_tokens(run, config, directory))
    splits, others = load_corpora(config, directory, limit, quiet)
    tokenizer = _tokenizer(run, config, splits, directory, quiet)
    plans = plan_arms(config, tokenizer)
    reach = getattr(plans[config.arms[0]].config, "max_position_embeddings", None)
    longest = max(config.seq_len, config.scoring_context)
    if reach is not None and longest > reach:
        raise PreskipError(
            f"{longest} tokens exceed the architecture's context of {reach}: lower --seq-len/--context-length, or "
            f"--set max_position_embeddings={longest}"
        )
    with progress_bar("tokenise training text", len(splits.training), quiet=quiet) as advance:
        packed = write_packed(
            run.path / "data",
            splits.training,
            tokenizer,
            seed=config.split_seed,
            advance=advance,
        )
    _check_enough(config, plans, packed, splits)
    with spinner("preparing the held-out texts", quiet=quiet):
        _write_development(run, config, splits, tokenizer)
        sets = _write_heldout(run, config, splits, others, tokenizer)
    environment_facts = environment.describe(config.device)
    attention = config.attn_implementation or _default_attention(plans[config.arms[0]])
    plain = plans.get("base", plans[config.arms[0]]).config
    facts = {
        "model": {
            "name": config.arch,
            "type": plain.model_type.removeprefix("preskip_"),
            "parameters": plans[config.arms[0]].size.parameters,
            "layers": plain.num_hidden_layers,
            "hidden_size": plain.hidden_size,
            "vocab_size": plain.vocab_size,
            "dtype": "float32",
            "attn_implementation": attention,
            "source": f"random weights, {config.arch}",
            "sha256": _model_checksum(config, len(tokenizer), fingerprint(tokenizer)),
            "revision": None,
        },
        "corpus": {
            "name": config.corpus,
            **amount_read(splits),
            "training_documents": packed.documents,
            "training_tokens": packed.tokens,
            "training_passes": round(max(plan.tokens for plan in plans.values()) / packed.tokens, 2),
            "development_documents": len(splits.development),
            "heldout_documents": len(splits.heldout),
            "source": splits.source,
            "sha256": splits.sha256,
            "packed_sha256": packed.sha256,
        },
        "tokenizer": {
            "source": config.tokenizer or "byte-level BPE trained on the training documents",
            "vocab_size": len(tokenizer),
            "sha256": fingerprint(tokenizer),
        },
        "environment": environment_facts,
        "arms": {name: plan.facts(config, attention, config.dtype) for name, plan in plans.items()},
        "seeds": list(config.seeds),
        "sets": sets,
        "family": declare_family(config.arms, sets),
        "published": None,
    }
    return plans, facts


def open_shared(run: RunDirectory) -> Shared:
    """Read what `prepare` has made.

    Raises:
        PreskipError: something is missing or damaged.
    """
    config = PretrainConfig.from_json(run.manifest["config"])
    tokenizer = load_tokenizer(str(run.path / "tokenizer"), trust_remote_code=config.trust_remote_code)
    data = run.path / "data"
    try:
        development = np.load(data / "development.npy")
    except (OSError, ValueError):
        raise PreskipError(f"{data / 'development.npy'} is missing or damaged: delete {data} and resume") from None
    texts = [
        prepare_texts(
            entry["name"],
            [Document(document["id"], document["text"], document["id"]) for document in entry["documents"]],
            tokenizer,
            context_length=config.scoring_context,
        )
        for entry in read_json(data / "heldout.json")
    ]
    return Shared(
        config=config,
        tokenizer=tokenizer,
        plans=plan_arms(config, tokenizer),
        blocks=open_blocks(data, config.seq_len),
        development=development,
        texts=texts,
    )


def declare_family(arms: tuple[str, ...], sets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The comparisons declared before training: preskip against the decisive controls among `arms`, on each set.

    Without preskip the first arm that is not `base` takes its place, against `base`.
    """
    reference = "preskip" if "preskip" in arms else next((arm for arm in arms if arm != "base"), None)
    others = [arm for arm in DECISIVE if arm in arms and arm != reference]
    declared = [
        {"arm": reference, "reference": other, "set": name, "metric": described["primary"]}
        for other in others
        if reference is not None
        for name, described in sets.items()
    ]
    return {"declared": declared, "alpha": ALPHA, "margins": dict(DEFAULT_MARGINS)}


def _tokenizer(run: RunDirectory, config: PretrainConfig, splits: Splits, directory: Path, quiet: bool) -> Any:
    folder = run.path / "tokenizer"
    if not folder.is_dir():
        if config.tokenizer is not None:
            tokenizer: Any = given_tokenizer(run, config, directory)
        else:
            with spinner(f"training a tokenizer of {config.vocab_size} tokens", quiet=quiet):
                tokenizer = train_tokenizer(splits.training, config.vocab_size)
        temporary = run.path / ".tokenizer"
        with clear_disk_errors(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            tokenizer.save_pretrained(temporary)
            temporary.rename(folder)
    return load_tokenizer(str(folder), trust_remote_code=config.trust_remote_code)


def _check_enough(config: PretrainConfig, plans: dict[str, Plan], packed: PackedText, splits: Splits) -> None:
    longest = max(plans.values(), key=lambda plan: plan.tokens)
    usable = packed.tokens // config.seq_len * config.seq_len
    if longest.tokens > usable and not config.repeat and not splits.whole:
        raise PreskipError(
            f"the part of corpus {config.corpus} that was read has {usable:,} training tokens, arm {longest.name} is "
            f"to read {longest.tokens:,}: {CHARACTERS_PER_TOKEN} characters per token were read; give a tokenizer with "
            "shorter tokens, or allow text to be read again with --repeat"
        )
    if longest.tokens > usable and not config.repeat:
        raise PreskipError(
            f"corpus {config.corpus} has {usable:,} training tokens, arm {longest.name} is to read {longest.tokens:,}: "
            f"it would be read {longest.tokens / max(1, usable):.1f} times; give more text or fewer --tokens, or allow "
            "it with --repeat"
        )
    if usable < config.tokens_per_step:
        raise PreskipError(
            f"corpus too small: {packed.tokens:,} training tokens do not fill one batch of {config.batch_size} x "
            f"{config.seq_len}: give more text, or lower --batch-size or --seq-len"
        )


def _write_development(run: RunDirectory, config: PretrainConfig, splits: Splits, tokenizer: Any) -> None:
    blocks = pack_blocks(
        splits.development,
        tokenizer,
        config.seq_len,
        limit_tokens=config.eval_blocks * config.seq_len,
        seed=config.split_seed,
        piece_characters=PIECE_CHARACTERS,
    )
    with clear_disk_errors(run.path):
        np.save(run.path / "data" / "development.npy", blocks)


def _write_heldout(
    run: RunDirectory,
    config: PretrainConfig,
    home: Splits,
    others: list[tuple[Splits, int, int]],
    tokenizer: Any,
) -> dict[str, dict[str, Any]]:
    sets, stored = {}, []
    for splits, count, words in ((home, config.eval_documents, config.eval_words), *others):
        name = slug(splits.name)
        documents = choose(splits.heldout, count, words, config.split_seed)
        text = prepare_texts(name, documents, tokenizer, context_length=config.scoring_context)
        sets[name] = text.describe(
            tokenizer,
            domain="in" if splits is home else "out",
            title=f"{name}, held-out documents",
            source=splits.source,
            sha256=splits.sha256,
        )
        stored.append({"name": name, "documents": [{"id": d.id, "text": d.text} for d in documents]})
    write_json(run.path / "data" / "heldout.json", stored)
    return sets


def _default_attention(plan: Plan) -> str:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(plan.config).config._attn_implementation


def _model_checksum(config: PretrainConfig, vocab_size: int, tokenizer: str) -> str:
    """Two runs compare the same thing if architecture and tokenizer are the same."""
    described = {"arch": config.arch, "overrides": config.overrides, "vocab_size": vocab_size, "tokenizer": tokenizer}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
