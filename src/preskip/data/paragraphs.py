"""The paper's training blocks: one paragraph each, padded or cut, in place of packed text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preskip.data.blocks import first_token
from preskip.errors import PreskipError

# A paragraph counts if it has more characters than this, white space at its ends aside (the paper's code).
LONGER_THAN = 50


def paper_paragraphs(texts: Iterable[str], count: int | None = 2000) -> list[str]:
    """The first paragraphs of some texts that are long enough, with their line ends; a paragraph is a line (WikiText).

    Args:
        texts: documents in the corpus's own order; read no further than needed.
        count: at most so many; None for all. Default 2,000 (the paper).
    """
    lines = (line for text in texts for line in re.findall(r"[^\n]+\n?", text) if len(line.strip()) > LONGER_THAN)
    return list(islice(lines, count))


def paper_blocks(
    texts: Iterable[str], tokenizer: Any, seq_len: int = 512
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """One block per paragraph, cut to `seq_len` tokens or padded on the right.

    No start or end token is added beyond what the tokenizer itself adds. Padding is not attended to and not trained on:
    the paper's text is silent, its code masks the labels of padding.

    Args:
        texts: paragraphs.
        tokenizer: a Hugging Face tokenizer.
        seq_len: tokens per block, at least 2. Default 512 (the paper).

    Returns:
        Token ids [N, seq_len] and the attention mask [N, seq_len], False on padding.

    Raises:
        PreskipError: `seq_len` too small, or no paragraph with two tokens.
    """
    if seq_len < 2:
        raise PreskipError(f"sequence length {seq_len}: must be at least 2")
    rows = [tokenizer(text, verbose=False)["input_ids"][:seq_len] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise PreskipError(f"no paragraph to train on: the corpus needs lines of more than {LONGER_THAN} characters")
    padding = first_token(tokenizer, "pad", "eos") or 0  # any valid id does: it is masked
    ids = np.full((len(rows), seq_len), padding, dtype=np.int32)
    mask = np.zeros((len(rows), seq_len), dtype=np.bool_)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = True
    return ids, mask


def block_labels(ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Labels [N, seq_len] of padded blocks: the ids, and -100 (which the loss passes over) on padding."""
    return np.where(mask, ids, -100).astype(np.int64)
