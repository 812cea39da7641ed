"""How the untouched model reads the blocks to train on: what an arm learns of them may be no gain elsewhere.

It may be lost without its start token, or at special tokens that stand in the text, as `<unk>` in WikiText: the arms
learn to repair that, and text in use has neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from preskip.data.blocks import Window, first_token, opening_token, start_token
from preskip.errors import DivergedError
from preskip.evaluate.likelihood import score_sequences, token_scores

# Blocks that are read, and the nats per token above which a model needs the token: SmolLM2 gains 0.01, Gemma 3 1.9.
BLOCKS = 8
NEEDED = 0.25
# Share of the loss above which special tokens matter: <unk> in WikiText has 0.19 with Gemma 3, whose token it is.
NOTABLE = 0.05


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


@torch.inference_mode()
def special_loss(model: nn.Module, tokenizer: Any, blocks: NDArray[np.int32]) -> dict[str, float] | None:
    """Share of the loss at each special token that stands in the text itself.

    Those that begin, end or pad a text do not count: they stand between documents.

    Args:
        model: a causal language model.
        tokenizer: a Hugging Face tokenizer.
        blocks: token ids, [N, seq_len]; of the first `BLOCKS` all tokens but the first are scored.

    Returns:
        By the token's text, the largest first; None where the loss is not finite.
    """
    borders = {first_token(tokenizer, kind) for kind in ("bos", "eos", "sep", "cls", "pad")}
    special = sorted({*tokenizer.all_special_ids} - borders)
    rows = torch.from_numpy(np.asarray(blocks[:BLOCKS], dtype=np.int64))
    device = next(model.parameters()).device
    nats: list[NDArray[np.float64]] = []
    with suppress(DivergedError):  # scoring says so
        for row in rows.to(device):
            nats.append(token_scores(model(row[None]).logits[0, :-1], row[1:])[0].numpy())
        loss, targets = np.concatenate(nats), rows[:, 1:].flatten().numpy()
        shares = {token: float(loss[targets == token].sum() / loss.sum()) for token in special if token in targets}
        found = sorted(shares, key=lambda token: -shares[token])
        return {str(tokenizer.convert_ids_to_tokens(token)): round(shares[token], 3) for token in found}
    return None


def reading_notes(facts: Mapping[str, Any]) -> list[str]:
    """What to say of how the model reads the training blocks, by what run.json says of its tokenizer."""
    return [*filter(None, [_start_note(facts.get("start_gain")), _special_note(facts.get("special_loss"))])]


def _special_note(shares: Mapping[str, float] | None) -> str | None:
    total = sum((shares or {}).values())
    if total <= NOTABLE:
        return None
    return (
        f"{total:.0%} of the untouched model's loss on the training blocks is at {', '.join(shares or ())}, which the "
        "tokenizer takes for special tokens: the arms also learn to expect them, in development texts, too; give "
        "--split-special-tokens, which reads them as text, or a corpus without them"
    )


def _start_note(gain: float | None) -> str | None:
    if gain is None or gain <= NEEDED:
        return None
    return (
        f"the untouched model reads the training blocks {gain:.2f} nats per token better behind its start token, which "
        "its tokenizer does not put there: the arms also learn to do without it; if the model needs it, give its "
        "folder with a tokenizer that adds it (add_bos_token)"
    )
