"""What the cells of a run from scratch share: the architecture, the tokenizer and the texts, in the run directory.

::

    RUN/tokenizer/              the tokenizer
    RUN/arch.json               the architecture's config, where it was given as a file
    RUN/data/tokens.bin, .json  training text (`preskip.data.packed`)
    RUN/data/development.npy    blocks that are evaluated while training
    RUN/data/heldout.json       documents that are scored afterwards
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from preskip.architecture.shapes import SHAPES
from preskip.arms import SCRATCH_ARMS
from preskip.arms.plan import Plan, Planner
from preskip.arms.shape import config_file, tokenizer_fields
from preskip.data.blocks import document_marks, pack_blocks
from preskip.data.corpus import Document
from preskip.data.packed import PackedText, write_packed
from preskip.data.splits import Splits, locate
from preskip.data.tokenizer import load_tokenizer, train_tokenizer
from preskip.errors import PreskipError
from preskip.evaluate.texts import TextSet, prepare_texts
from preskip.experiment.prepared import started_in
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.experiment.reading import CHARACTERS_PER_TOKEN
from preskip.progress import progress_bar, spinner
from preskip.runs.directory import RunDirectory
from preskip.runs.files import clear_disk_errors, read_json, sync_tree, write_json
from preskip.runs.schema import HeldOutSet

# Blocks of whole development documents that are tokenised for each one that is evaluated, so that many documents count.
DRAWN_FROM = 16


def plan_arms(config: PretrainConfig, tokenizer: Any | None, arch: str | None = None) -> dict[str, Plan]:
    """Solve every arm of a run.

    Args:
        config: every option.
        tokenizer: of all arms; None where it will be trained.
        arch: the architecture, where it lies elsewhere than the options say.

    Raises:
        PreskipError: an architecture that cannot be built; the arm is named.
    """
    fields = {"vocab_size": config.vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if tokenizer is not None:
        fields = tokenizer_fields(tokenizer)
    planner = Planner(
        arch=arch or config.arch,
        overrides=config.overrides,
        fields=fields,
        own_vocabulary=config.tokenizer is not None,
        settings=config.settings,
        skip_position=config.skip_position,
        layers=None if config.layers is None else tuple(map(int, config.layers)),
        seq_len=config.seq_len,
        steps=config.steps,
        tokens_per_step=config.tokens_per_step,
    )
    return {name: planner.plan(SCRATCH_ARMS[name]) for name in config.arms}


def most_tokens(run: RunDirectory, config: PretrainConfig) -> int:
    """Tokens of the arm that reads most; only those of equal FLOPs read more than the others.

    Raises:
        PreskipError: an arm that cannot be built, before any corpus is read.
    """
    tokenizer = None if config.tokenizer is None else _given_tokenizer(run, config)
    return max(plan.tokens for plan in plan_arms(config, tokenizer, stored_arch(run, config)).values())


def stored_arch(run: RunDirectory, config: PretrainConfig) -> str:
    """The run's copy of an architecture that was given as a file, or that one where there is no copy; else the name."""
    copy = _arch_copy(run)
    if copy.is_file():
        return str(copy)
    return config.arch if config.arch in SHAPES else locate(config.arch, started_in(run))


def keep_arch(run: RunDirectory, config: PretrainConfig) -> None:
    """Copy the architecture into the run, where it was given as a file; a run that an earlier preskip began has no copy
    and gets none.
    """
    file = config_file(stored_arch(run, config))
    if file is not None and "model" not in run.manifest:
        write_json(_arch_copy(run), read_json(file))


def arch_facts(run: RunDirectory, config: PretrainConfig) -> Any:
    """The architecture as a digest of the model takes it: the stored config, or the name."""
    return read_json(_arch_copy(run)) if _arch_copy(run).is_file() else config.arch


def _arch_copy(run: RunDirectory) -> Path:
    return run.path / "arch.json"


def _given_tokenizer(run: RunDirectory, config: PretrainConfig) -> Any:
    """The run's copy of the tokenizer that was given, or that one where there is no copy yet."""
    assert config.tokenizer is not None
    copy = run.path / "tokenizer"
    name = str(copy) if copy.is_dir() else locate(config.tokenizer, started_in(run))
    return load_tokenizer(name, trust_remote_code=config.trust_remote_code)


def stored_tokenizer(run: RunDirectory, config: PretrainConfig, splits: Splits, quiet: bool) -> Any:
    """The run's tokenizer: stored there, where it is not yet, as given or trained on the training documents."""
    folder = run.path / "tokenizer"
    if not folder.is_dir():
        if config.tokenizer is not None:
            tokenizer: Any = _given_tokenizer(run, config)
        else:
            with spinner(f"training a tokenizer of {config.vocab_size} tokens", quiet=quiet):
                tokenizer = train_tokenizer(splits.training, config.vocab_size)
        temporary = run.path / ".tokenizer"
        with clear_disk_errors(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            tokenizer.save_pretrained(temporary)
            sync_tree(temporary)
            temporary.rename(folder)
    return open_tokenizer(run, config)


def open_tokenizer(run: RunDirectory, config: PretrainConfig) -> Any:
    """The tokenizer in the run directory."""
    return load_tokenizer(
        str(run.path / "tokenizer"),
        trust_remote_code=config.trust_remote_code,
        split_special_tokens=config.split_special_tokens,
    )


def development_blocks(run: RunDirectory, config: PretrainConfig, splits: Splits, tokenizer: Any) -> np.ndarray:
    """Blocks of development text, [M, seq_len], made as those of the training text are.

    A run that goes on keeps its own, so that its losses can be compared, whatever preskip began it.
    """
    if "corpus" in run.manifest:
        with suppress(OSError, ValueError, EOFError):
            return np.load(run.path / "data" / "development.npy")
    blocks = pack_blocks(
        splits.development,
        tokenizer,
        config.seq_len,
        limit_tokens=DRAWN_FROM * config.eval_blocks * config.seq_len,
        seed=config.split_seed,
        marks=document_marks(tokenizer),
        part="development",
    )
    return blocks[: config.eval_blocks]


def is_complete(run: RunDirectory, config: PretrainConfig) -> bool:
    """Whether no cell is still to come, so that the texts of a finished run may stay as an earlier preskip cut them."""
    return all(run.cell(arm, seed).is_done for arm in config.arms for seed in config.seeds)


def store_training(
    run: RunDirectory, config: PretrainConfig, plans: dict[str, Plan], tokenizer: Any, splits: Splits, quiet: bool
) -> PackedText:
    """Write the training text as tokens, as far as they are not there yet.

    Raises:
        PreskipError: it is too short for an arm, or no longer what a run that goes on was trained on.
    """
    folder = run.path / "data"
    with progress_bar("tokenise training text", len(splits.training), quiet=quiet) as advance:
        packed = write_packed(folder, splits.training, tokenizer, seed=config.split_seed, advance=advance)
    begun = run.manifest.get("corpus", {}).get("packed_sha256", packed.sha256)
    if packed.sha256 != begun and not is_complete(run, config):
        raise PreskipError(
            f"{folder / 'tokens.bin'} was missing or damaged, and the training text now becomes other tokens than "
            "when this run began: start a new run"
        )
    _check_enough(config, plans, packed, splits)
    return packed


def store_texts(run: RunDirectory, development: np.ndarray, texts: list[TextSet]) -> None:
    """Write development blocks [M, seq_len] and the documents that are scored, for `open_texts`."""
    folder = run.path / "data"
    with clear_disk_errors(run.path):
        temporary = folder / ".development.npy"
        np.save(temporary, development)
        temporary.replace(folder / "development.npy")
    stored: list[HeldOutSet] = [
        {"name": text.name, "documents": [{"id": d.id, "text": d.text, "group": d.group} for d in text.documents]}
        for text in texts
    ]
    write_json(folder / "heldout.json", stored)


def open_texts(run: RunDirectory, config: PretrainConfig, tokenizer: Any) -> tuple[np.ndarray, list[TextSet]]:
    """Development blocks [M, seq_len] and the sets that are scored, from the run directory.

    Raises:
        PreskipError: they are missing or damaged.
    """
    folder = run.path / "data"
    try:
        development = np.load(folder / "development.npy")
    except (OSError, ValueError):
        raise PreskipError(f"{folder / 'development.npy'} is missing or damaged: delete {folder} and resume") from None
    texts = [
        prepare_texts(
            entry["name"],
            [Document(its["id"], its["text"], its.get("group", its["id"])) for its in entry["documents"]],
            tokenizer,
            context_length=config.scoring_context,
            reopen=False,
        )
        for entry in read_json(folder / "heldout.json")
    ]
    return development, texts


def _check_enough(config: PretrainConfig, plans: dict[str, Plan], packed: PackedText, splits: Splits) -> None:
    longest = max(plans.values(), key=lambda plan: plan.tokens)
    usable = packed.tokens // config.seq_len * config.seq_len
    if longest.tokens > usable and not config.repeat:
        has = f"{usable:,} training tokens, arm {longest.name} is to read {longest.tokens:,}: "
        if splits.whole:
            raise PreskipError(
                f"corpus {config.corpus} has {has}it would be read {longest.tokens / max(1, usable):.1f} times; give "
                "more text or fewer --tokens, or allow it with --repeat"
            )
        raise PreskipError(
            f"the part of corpus {config.corpus} that was read has {has}{CHARACTERS_PER_TOKEN} characters per token "
            "were read; give a tokenizer with shorter tokens, or allow text to be read again with --repeat"
        )
    if usable < config.tokens_per_step:
        raise PreskipError(
            f"corpus too small: {packed.tokens:,} training tokens do not fill one batch of {config.batch_size} x "
            f"{config.seq_len}: give more text, or lower --batch-size or --seq-len"
        )
