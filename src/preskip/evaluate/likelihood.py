"""Scores of held-out text: negative log-likelihood per document, and last words by greedy match.

Sequences are right-padded and batched by length; the output head runs only at scored positions. Shapes: B rows, T
tokens, d width, V vocabulary, S scored positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from preskip.data.blocks import Window, heldout_windows, scored_size
from preskip.data.corpus import Document
from preskip.data.last_word import LastWordItem, encode_item
from preskip.errors import PreskipError
from preskip.progress import Advance, no_progress


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the model says of one sequence's scored part.

    Attributes:
        nll: negative log-likelihood in nats, summed over the scored tokens.
        tokens: number of scored tokens.
        greedy: whether each scored token is the most likely one.
    """

    nll: float
    tokens: int
    greedy: bool


@contextmanager
def _head_only_at(model: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Let the output head see only the hidden states at `positions` [B, T] (bool), as one row [1, S, d]."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise PreskipError(f"{type(model).__name__} has no output head: likelihoods need a causal language model")
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][positions].unsqueeze(0), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def score_sequences(
    model: nn.Module,
    sequences: Sequence[Window],
    *,
    batch_tokens: int = 2048,
    pad_token_id: int = 0,
    advance: Advance = no_progress,
) -> list[Score]:
    """Score many sequences, in the given order.

    Args:
        model: a causal language model in evaluation mode, also a PEFT model.
        sequences: what to score.
        batch_tokens: upper bound of padded tokens per forward pass; it does not change the scores.
        pad_token_id: any valid id; padding is masked.
        advance: progress, called as advance(done sequences, note).

    Returns:
        One score per sequence, in the given order.

    Raises:
        PreskipError: a log-likelihood is NaN or infinite.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    scores: list[Score | None] = [None] * len(sequences)
    done = 0
    try:
        for batch in _batches(sequences, batch_tokens):
            rows = [sequences[index] for index in batch]
            length = len(rows[0].input_ids) - 1  # the last token is predicted, not read
            ids = torch.full((len(rows), length), pad_token_id)  # [B, T]
            mask = torch.zeros((len(rows), length), dtype=torch.long)
            positions = torch.zeros((len(rows), length), dtype=torch.bool)
            for line, row in enumerate(rows):
                size = len(row.input_ids) - 1
                ids[line, :size] = torch.tensor(row.input_ids[:-1])
                mask[line, :size] = 1
                positions[line, row.scored_from - 1 : size] = True
            scored = [token for row in rows for token in row.input_ids[row.scored_from :]]
            targets = torch.tensor(scored, device=device)  # [S]
            with _head_only_at(_language_model(model), positions.to(device)):
                logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits[0]
            logits = logits.float()  # [S, V]
            nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().cpu()
            greedy = (logits.argmax(-1) == targets).cpu()
            if not torch.isfinite(nll).all():
                raise PreskipError("the model's log-likelihood is NaN or infinite: try --dtype float32")
            sizes = [len(row.input_ids) - row.scored_from for row in rows]
            parts = zip(batch, nll.split(sizes), greedy.split(sizes), strict=True)
            for index, row_nll, row_greedy in parts:
                scores[index] = Score(nll=row_nll.sum().item(), tokens=len(row_nll), greedy=bool(row_greedy.all()))
            done += len(batch)
            advance(done, "")
    finally:
        model.train(was_training)
    return scores  # type: ignore[return-value]


@torch.inference_mode()
def check_causal(model: nn.Module) -> None:
    """Refuse a model whose predictions see later tokens: its likelihoods would be those of a text it has read.

    Raises:
        PreskipError: other tokens behind the first change its logits, as in BERT and other masked language models.
    """
    ids = torch.tensor([[1] + 15 * [2], [1] + 15 * [3]], device=next(model.parameters()).device)
    first, second = model(input_ids=ids, use_cache=False).logits[:, 0].float()  # [V], the same context in both
    if (first - second).abs().max() > 5e-3 * first.abs().max():  # rounding in bfloat16 stays below
        raise PreskipError(
            f"{type(model).__name__} sees later tokens, as a masked language model does: a probe needs a causal "
            "language model such as llama or gpt_neox"
        )


def _language_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _batches(sequences: Sequence[Window], batch_tokens: int) -> Iterator[list[int]]:
    """Indices grouped by length, longest first, so that the first batch shows whether memory suffices."""
    batch: list[int] = []
    width = 0
    for index in sorted(range(len(sequences)), key=lambda i: -len(sequences[i].input_ids)):
        width = width or len(sequences[index].input_ids)
        if batch and width * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, width = [], len(sequences[index].input_ids)
        batch.append(index)
    if batch:
        yield batch


def document_windows(
    documents: Sequence[Document], tokenizer: Any, *, context_length: int, stride: int
) -> tuple[list[Window], list[int]]:
    """Cut documents into windows (`preskip.data.blocks.heldout_windows`).

    Returns:
        The windows of all documents, and for each the index of its document.
    """
    sequences: list[Window] = []
    owners: list[int] = []
    for index, document in enumerate(documents):
        windows = heldout_windows(document, tokenizer, context_length, stride)
        sequences += windows
        owners += [index] * len(windows)
    return sequences, owners


def document_records(
    documents: Sequence[Document], owners: Sequence[int], scores: Sequence[Score], tokenizer: Any
) -> list[dict[str, Any]]:
    """One item record per document: summed nats, tokens, UTF-8 bytes and words of the scored text."""
    sizes = [scored_size(document, tokenizer) for document in documents]
    nll, tokens = [0.0] * len(documents), [0] * len(documents)
    for owner, score in zip(owners, scores, strict=True):
        nll[owner] += score.nll
        tokens[owner] += score.tokens
    return [
        {
            "kind": "document",
            "id": document.id,
            "nll": nll[index],
            "tokens": tokens[index],
            "bytes": sizes[index].bytes,
            "words": sizes[index].words,
        }
        for index, document in enumerate(documents)
    ]


def last_word_windows(items: Sequence[LastWordItem], tokenizer: Any) -> list[Window]:
    """The token sequence of each item; its target's tokens are scored."""
    sequences = []
    for item in items:
        context, target = encode_item(item, tokenizer)
        sequences.append(Window(context + target, len(context)))
    return sequences


def last_word_records(items: Sequence[LastWordItem], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """One item record per last-word item: correct if every token of the target is the most likely one."""
    return [
        {
            "kind": "last_word",
            "id": item.id,
            "document": item.document,
            "correct": score.greedy,
            "nll": score.nll,
            "tokens": score.tokens,
            "target": item.target,
        }
        for item, score in zip(items, scores, strict=True)
    ]
