"""Whether a model reads text better behind its start token, where its tokenizer does not put one there."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from preskip.data.blocks import Window, opening_token, start_token
from preskip.errors import DivergedError
from preskip.evaluate.likelihood import score_sequences

# Blocks that are read, and the nats per token above which a model needs the token: SmolLM2 gains 0.01, Gemma 3 1.9.
BLOCKS = 8
NEEDED = 0.25


def start_gain(
    model: nn.Module, tokenizer: Any, blocks: NDArray[np.int32], *, batch_tokens: int | None = None
) -> float | None:
    """Nats per token by which a model reads blocks better behind its start token.

    Args:
        model: a causal language model.
        tokenizer: a Hugging Face tokenizer.
        blocks: token ids without that token, [N, seq_len]; of the first `BLOCKS` all tokens but the first are scored.
        batch_tokens: as of `score_sequences`.

    Returns:
        NLL without minus NLL with it; None where the tokenizer opens a text with it itself, has none, or the loss is
        not finite.
    """
    start = start_token(tokenizer)
    if start is None or opening_token(tokenizer) is not None:
        return None
    rows = [block.tolist() for block in blocks[:BLOCKS]]
    with suppress(DivergedError):  # scoring says so
        without = score_sequences(model, [Window(row, 1) for row in rows], batch_tokens=batch_tokens)
        behind = score_sequences(model, [Window([start, *row], 2) for row in rows], batch_tokens=batch_tokens)
        nats = sum(score.nll for score in without) - sum(score.nll for score in behind)
        return round(nats / sum(score.tokens for score in without), 3)
    return None


def start_note(gain: float | None) -> str | None:
    """What to say of a model that needs its start token; None where it does not, or nothing is known."""
    if gain is None or gain <= NEEDED:
        return None
    return (
        f"the untouched model reads the training blocks {gain:.2f} nats per token better behind its start token, which "
        "its tokenizer does not put there: the arms also learn to do without it; if the model needs it, give its "
        "folder with a tokenizer that adds it (add_bos_token)"
    )
