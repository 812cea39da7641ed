"""The texts of a pretraining run, and how much of a corpus without end is read for its tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from preskip.data.local import data_directory
from preskip.data.recorded import locate
from preskip.data.splits import DEVELOPMENT, Splits, load_splits, slug
from preskip.data.tables import Limit
from preskip.data.tokenizer import load_tokenizer
from preskip.errors import PreskipError
from preskip.experiment.parse import parse_extent
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.pretrain.arms import plan_arms
from preskip.runs.directory import RunDirectory

# More than a token of the usual tokenizers has on average, in any script: as much text is read of a corpus without end.
CHARACTERS_PER_TOKEN = 6


def load_corpora(
    config: PretrainConfig, directory: Path, limit: Limit, quiet: bool
) -> tuple[Splits, list[tuple[Splits, int, int]]]:
    """The training corpus, and the others with the number of documents and words to score.

    Args:
        config: every option.
        directory: the run was started in.
        limit: of the training corpus.
        quiet: no progress.

    Raises:
        PreskipError: a corpus that cannot be read or has too few documents, or two of one name.
    """
    data_dir = data_directory(locate(config.data_dir, directory) if config.data_dir else None)
    options: dict[str, Any] = {
        "data_dir": data_dir,
        "heldout_fraction": config.heldout_fraction,
        "seed": config.split_seed,
        "progress": not quiet,
    }
    home = load_splits(
        locate(config.corpus, directory),
        text_column=config.text_column,
        split=config.corpus_split,
        limit=limit,
        **options,
    )
    for part, count in (("held-out", len(home.heldout)), ("development", len(home.development))):
        least = 2 if part == "held-out" else 1
        if count < least:
            raise PreskipError(
                f"corpus {config.corpus} has {count} {part} documents, {least} or more are needed: raise "
                "--heldout-fraction, or give more documents"
            )
    others = []
    for text in config.eval_corpora:
        name, count, length = parse_extent(text, config.eval_documents, config.eval_words)
        others.append((load_splits(locate(name, directory), **options), count, length))
    names = [slug(splits.name) for splits in (home, *(entry[0] for entry in others))]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PreskipError(f"two evaluation sets are named {twice!r}: rename a file, or leave one out")
    return home, others


def reading_limit(config: PretrainConfig, tokens: int) -> Limit:
    """How much of a table or a Hub data set is read: enough for so many training tokens and for the other two parts.

    Args:
        config: every option.
        tokens: of the arm that reads most.
    """
    training = (1 - config.heldout_fraction) * (1 - DEVELOPMENT)
    development = (1 - config.heldout_fraction) * DEVELOPMENT
    wanted = max(tokens / training, config.eval_blocks * config.seq_len / development)
    return Limit(
        reason=f"enough for {tokens:,} training tokens, at {CHARACTERS_PER_TOKEN} characters each",
        characters=math.ceil(CHARACTERS_PER_TOKEN * wanted),
        least_documents=math.ceil(config.eval_documents / config.heldout_fraction),
    )


def most_tokens(run: RunDirectory, config: PretrainConfig, directory: Path) -> int:
    """Tokens of the arm that reads most; only base-flops reads more than the others.

    Raises:
        PreskipError: an arm that cannot be built, before any corpus is read.
    """
    if "base-flops" not in config.arms:
        return config.steps * config.tokens_per_step
    tokenizer: Any = _TokenizerToCome(config.vocab_size)
    if config.tokenizer is not None:
        tokenizer = given_tokenizer(run, config, directory)
    return max(plan.tokens for plan in plan_arms(config, tokenizer).values())


def amount_read(splits: Splits) -> dict[str, Any]:
    """What run.json says of how much was read."""
    documents = [*splits.training, *splits.development, *splits.heldout]
    return {
        "documents_read": len(documents),
        "characters_read": sum(len(document.text) for document in documents),
        "read_whole": splits.whole,
    }


def given_tokenizer(run: RunDirectory, config: PretrainConfig, directory: Path) -> Any:
    """The run's copy of the tokenizer that was given, or that one where there is no copy yet."""
    assert config.tokenizer is not None
    copy = run.path / "tokenizer"
    name = str(copy) if copy.is_dir() else locate(config.tokenizer, directory)
    return load_tokenizer(name, trust_remote_code=config.trust_remote_code)


class _TokenizerToCome:
    """As much of the tokenizer that will be trained as the arms' sizes depend on."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size
