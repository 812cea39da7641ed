"""The tokenizer of a model trained from scratch: byte-level BPE trained on its documents, or one that exists."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preskip.data.corpus import Document, by_id, split_text
from preskip.errors import PreskipError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
# What a tokenizer saves in its folder; one in pure Python has the second alone.
OWN_FILES = ("tokenizer.json", "tokenizer_config.json")
# 256 bytes, the end of text, and at least one merge.
SMALLEST = 258
# Pre-tokenisation never joins paragraphs, so a document may be given in pieces that the trainer can hold.
PIECE_CHARACTERS = 100_000


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on documents, in the order of their ids.

    Every text can be encoded, since all 256 bytes are in the vocabulary. `<|endoftext|>`, id 0, is start, end and
    padding token.

    Args:
        documents: training documents only; held-out text must not choose the merges.
        vocab_size: tokens in all, at least 258.

    Raises:
        PreskipError: `vocab_size` is too small, or the text has too few different words to reach it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST:
        raise PreskipError(f"--vocab-size {vocab_size} is too small: bytes alone take 256, give {SMALLEST} or more")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (piece for document in by_id(documents) for piece in split_text(document.text, PIECE_CHARACTERS))
    backend.train_from_iterator(pieces, trainer)
    if (found := backend.get_vocab_size()) < vocab_size:
        raise PreskipError(
            f"--vocab-size {vocab_size}: the training text gives only {found} tokens; lower it, or give more text"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None, split_special_tokens: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer: an embedded model's, a local folder, a `tokenizer.json`, or a Hub id, perhaps at a revision.

    A bare `tokenizer.json` names no special tokens; `<|endoftext|>` is its end token where it has one.

    Args:
        name: as above.
        trust_remote_code: allow code from the repository to run. Default False.
        revision: of a Hub id. Default: the main one.
        split_special_tokens: read special tokens that a text contains as text. Default: as the tokenizer says itself.

    Raises:
        PreskipError: there is none, or it cannot be read.
    """
    tokenizer = _read(name, trust_remote_code, revision)
    if split_special_tokens:
        tokenizer.split_special_tokens = True
    return tokenizer


def _read(name: str, trust_remote_code: bool, revision: str | None) -> PreTrainedTokenizerBase:
    path = Path(name).expanduser()
    is_file = path.suffix == ".json" and path.is_file()
    if not is_file and not any((path / name).is_file() for name in OWN_FILES):
        from preskip.assets import load_tokenizer as load_any

        return load_any(name, trust_remote_code=trust_remote_code, revision=revision)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if not is_file:
            return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # the libraries raise many kinds, the Rust one bare Exceptions
        reason = one_line(error, 120)
        raise PreskipError(f"tokenizer {name} cannot be read ({reason}): give a folder or a tokenizer.json") from None
    if END_OF_TEXT in tokenizer.get_vocab():
        tokenizer.bos_token = tokenizer.eos_token = END_OF_TEXT
    return tokenizer


def fingerprint(tokenizer: Any, start: int | None = None) -> str:
    """SHA-256 of the vocabulary and of what a sample text becomes: two tokenizers that differ give different tokens.

    Args:
        tokenizer: of transformers.
        start: the token that opens a text, where it is put there by others than the tokenizer.
    """
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0])):
        digest.update(f"{index}\0{token}\0".encode())
    digest.update(repr(tokenizer("Don't stop: 1,024  naïve words\n\n\tand tabs.")["input_ids"]).encode())
    if start is not None:
        digest.update(f"start {start}".encode())
    return digest.hexdigest()
