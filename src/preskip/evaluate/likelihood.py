"""Scores of held-out text: negative log-likelihood per document, and last words by greedy match.

Sequences are right-padded and batched by length, common beginnings are read once (`preskip.evaluate.sharing`), and the
output head runs only at scored positions. Shapes: B rows, T tokens, d width, V vocabulary, S scored positions.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from preskip.adapter import base_model
from preskip.data.blocks import Window, heldout_windows, scored_size
from preskip.data.corpus import Document
from preskip.data.last_word import LastWordItem, encode_item
from preskip.errors import DivergedError, PreskipError
from preskip.evaluate.kernels import scoring_kernels
from preskip.evaluate.sharing import Row, plain_rows, reach, shared_rows, tree_inputs
from preskip.forwards import evaluating
from preskip.progress import Advance, no_progress, say
from preskip.runs.schema import DocumentRecord, ItemRecord, Record
from preskip.runs.stored import failed_notes

T = TypeVar("T")
# Rows of logits whose loss is computed at once: its copies of V numbers each stay small beside the logits. On a
# processor also few enough numbers (2 MB) for the C library to keep their memory between parts: it gives larger blocks
# back, and fresh pages take as long as the loss itself.
_LOSS_ROWS = 256
_LOSS_NUMBERS = 2**19
FAILED = "its log-likelihood is NaN or infinite: try --dtype float32"
_NOT_FINITE = "the model's log-likelihood is NaN or infinite: try --dtype float32"


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
def head_only_at(model: nn.Module, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[None]:
    """Let the output head see only the hidden states at `rows` [S], `columns` [S] (from the end), as one row [1, S, d].

    Counted from the end, because prompt tuning puts its virtual tokens before the text.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise PreskipError(f"{type(model).__name__} has no output head: likelihoods need a causal language model")
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][rows, columns].unsqueeze(0), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def default_batch_tokens(device: torch.device) -> int:
    """Padded tokens per forward pass: what a processor's caches hold, or what keeps an accelerator busy."""
    return 512 if device.type == "cpu" else 4096


@torch.inference_mode()
def score_sequences(
    model: nn.Module,
    sequences: Sequence[Window],
    *,
    batch_tokens: int | None = None,
    advance: Advance = no_progress,
    keep_failed: bool = False,
) -> list[Score]:
    """Score many sequences, in the given order.

    Args:
        model: a causal language model in evaluation mode, also a PEFT model.
        sequences: what to score.
        batch_tokens: upper bound of padded tokens per forward pass; it does not change the scores, but of a model whose
            positions are scaled by the longest row of a batch (LongRoPE) beyond its original context. None takes 512 on
            a processor, whose caches hold that, and 4,096 elsewhere.
        advance: progress, called as advance(done sequences, note).
        keep_failed: give a sequence whose log-likelihood is not finite a score of NaN, unless all are so.

    Returns:
        One score per sequence, in the given order.

    Raises:
        DivergedError: a log-likelihood is NaN or infinite.
    """
    limit = batch_tokens or default_batch_tokens(next(model.parameters()).device)
    reads = {index: array("i", sequence.input_ids[:-1]) for index, sequence in enumerate(sequences)}
    scores: dict[int, Score] = {}

    def score(rows: Iterable[Row], *, strict: bool) -> None:
        # The longest first, so that the first batch shows whether memory suffices.
        for batch in batches(sorted(rows, key=len, reverse=True), limit):
            own = _score_rows(model, batch, sequences, strict=strict)
            for row in batch:
                # What is not finite spoils its neighbours in a shared row: all of them are left to the plain rows.
                if not row.shared or all(math.isfinite(own[index].nll) for index in row.paths):
                    scores.update((index, own[index]) for index in row.paths)
            advance(len(scores), "")

    with evaluating(model):
        trees = _trees(model, reads, limit)
        if trees and (proven := _proven(model, trees[0], sequences)):
            scores.update(proven)
            advance(len(scores), "")
            score(trees[1:], strict=False)
        score(plain_rows({index: read for index, read in reads.items() if index not in scores}), strict=not keep_failed)
    if sequences and all(math.isnan(score.nll) for score in scores.values()):
        raise DivergedError(_NOT_FINITE)
    return [scores[index] for index in range(len(sequences))]


def _score_rows(
    model: nn.Module, batch: Sequence[Row], sequences: Sequence[Window], *, strict: bool
) -> dict[int, Score]:
    """One forward pass: the score of every sequence in the rows of a batch, by its index."""
    device, length = next(model.parameters()).device, max(map(len, batch))
    # [B, T]; padding, any valid id, stands behind the text, where a causal model cannot see it.
    ids = torch.zeros((len(batch), length), dtype=torch.long)
    lines: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    members = [index for row in batch for index in row.paths]
    for line, row in enumerate(batch):
        ids[line, : len(row)] = torch.tensor(list(row.ids))
        for index, path in row.paths.items():
            start = sequences[index].scored_from
            lines += [line] * (len(path) + 1 - start)
            columns += [column - length for column in path[start - 1 :]]
            targets += sequences[index].input_ids[start:]
    places = torch.tensor(lines, device=device), torch.tensor(columns, device=device)  # [S] each
    dtype = base_model(model).get_input_embeddings().weight.dtype
    with head_only_at(base_model(model), *places), scoring_kernels():
        inputs = tree_inputs(batch, length, dtype=dtype, device=device)
        logits = model(input_ids=ids.to(device), use_cache=False, **inputs).logits[0]
    nll, greedy = token_scores(logits, torch.tensor(targets, device=device), strict=strict)
    sizes = [len(sequences[index].input_ids) - sequences[index].scored_from for index in members]
    scores = {}
    for index, own_nll, own_greedy in zip(members, nll.split(sizes), greedy.split(sizes), strict=True):
        nats = own_nll.sum().item()
        nats = nats if math.isfinite(nats) else math.nan
        scores[index] = Score(nll=nats, tokens=len(own_nll), greedy=bool(own_greedy.all()))
    return scores


def _trees(model: nn.Module, reads: Mapping[int, array[int]], limit: int) -> list[Row]:
    """Shared rows, one that branches first, where they save a twentieth of all tokens beyond the proof; else none."""
    most = reach(model)
    if most is None:
        return []
    width = base_model(model).get_input_embeddings().weight.shape[-1]
    rows = shared_rows(reads, limit=limit, reach=most, width=width)
    trees = sorted((row for row in rows if row.shared), key=lambda row: (row.branches, len(row)), reverse=True)
    if not trees:
        return []
    apart = {reads[index].tobytes(): len(reads[index]) for row in trees for index in row.paths}
    saved = sum(apart.values()) - sum(map(len, trees)) - sum(len(reads[index]) for index in _last_two(trees[0]))
    return trees if saved > 0.05 * sum(map(len, reads.values())) else []


def _last_two(tree: Row) -> list[int]:
    return list(tree.paths)[-2:]


def _proven(model: nn.Module, tree: Row, sequences: Sequence[Window]) -> dict[int, Score]:
    """The scores of a tree, if the two sequences behind all others have the same alone, but for rounding; else none.

    Models differ in what they make of a mask, and some raise.
    """
    try:
        scores = _score_rows(model, [tree], sequences, strict=False)
    except Exception:  # of every kind
        return {}
    alone: dict[int, Score] = {}
    for row in plain_rows({index: sequences[index].input_ids[:-1] for index in _last_two(tree)}):
        alone |= _score_rows(model, [row], sequences, strict=False)
    tolerance = 5e-2 if base_model(model).dtype in (torch.bfloat16, torch.float16) else 1e-5
    same = (abs(scores[index].nll - one.nll) <= tolerance * (1 + one.nll) for index, one in alone.items())
    return scores if all(same) and all(math.isfinite(one.nll) for one in scores.values()) else {}


def token_scores(
    logits: torch.Tensor, targets: torch.Tensor, *, strict: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats (float64) of each target [S], and whether it is the most likely one, from logits [S, V]; in fp32.

    Raises:
        DivergedError: a log-likelihood is NaN or infinite, and `strict` is set.
    """
    on_cpu = logits.device.type == "cpu"
    rows = max(1, min(_LOSS_ROWS, _LOSS_NUMBERS // logits.shape[-1])) if on_cpu else _LOSS_ROWS
    nll, greedy = [], []
    for part, wanted in zip(logits.split(rows), targets.split(rows), strict=True):
        part = part.float()  # once for both: on a processor, argmax over bfloat16 is four times as slow
        nll.append(torch.nn.functional.cross_entropy(part, wanted, reduction="none"))
        greedy.append(part.argmax(-1) == wanted)
    nats = torch.cat(nll).double().cpu()
    if strict and not torch.isfinite(nats).all():
        raise DivergedError(_NOT_FINITE)
    return nats, torch.cat(greedy).cpu()


@torch.inference_mode()
def check_causal(model: nn.Module) -> None:
    """Refuse a model whose predictions see later tokens: its likelihoods would be those of a text it has read.

    Raises:
        PreskipError: other tokens behind the first change its logits, as in BERT and other masked language models.
    """
    device, rows = next(model.parameters()).device, model.get_input_embeddings().weight.shape[0]  # type: ignore
    ids = torch.tensor([[1] + 15 * [2], [1] + 15 * [3]], device=device) % rows
    first, second = model(input_ids=ids, use_cache=False).logits[:, 0].float()  # [V], the same context in both
    if (first - second).abs().max() > 5e-3 * first.abs().max():  # rounding in bfloat16 stays below
        raise PreskipError(
            f"{type(model).__name__} sees later tokens, as a masked language model does: a probe needs a causal "
            "language model such as llama or gpt_neox"
        )


def batches(rows: Iterable[T], batch_tokens: int, length: Callable[[T], int] = len) -> Iterator[list[T]]:  # type: ignore[assignment]
    """Consecutive rows that one forward pass of `batch_tokens` padded tokens takes, one at least; `length` is a row's.

    Rows come in an order in which neighbours are of nearly one length, or padding fills the batches.
    """
    batch: list[T] = []
    longest = 0
    for row in rows:
        size = length(row)
        if batch and max(longest, size) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, longest = [], 0
        batch.append(row)
        longest = max(longest, size)
    if batch:
        yield batch


def document_windows(
    documents: Sequence[Document], tokenizer: Any, *, context_length: int, stride: int, reopen: bool = True
) -> tuple[list[Window], list[int]]:
    """The windows of all documents (`preskip.data.blocks.heldout_windows`), and for each the index of its document."""
    cut = [heldout_windows(document, tokenizer, context_length, stride, reopen=reopen) for document in documents]
    owners = [index for index, windows in enumerate(cut) for _ in windows]
    return [window for windows in cut for window in windows], owners


def document_records(
    name: str, documents: Sequence[Document], owners: Sequence[int], scores: Sequence[Score], tokenizer: Any
) -> list[DocumentRecord]:
    """One item record per document of the set `name`: summed nats, tokens, UTF-8 bytes and words of the scored text.

    Documents of a group that has others in the set (pieces of one book, versions of one speech) are a cluster. One
    whose score is not finite has none; it is reported.
    """
    sizes = [scored_size(document, tokenizer) for document in documents]
    nll, tokens = [0.0] * len(documents), [0] * len(documents)
    for owner, score in zip(owners, scores, strict=True):
        nll[owner] += score.nll
        tokens[owner] += score.tokens
    records: list[DocumentRecord] = []
    labels = shared_groups(documents)
    for document, size, nats, count, label in zip(documents, sizes, nll, tokens, labels, strict=True):
        record: DocumentRecord = {
            "set": name,
            "kind": "document",
            "id": document.id,
            "nll": nats,
            "tokens": count,
            "bytes": size.bytes,
            "words": size.words,
        }
        if not math.isfinite(nats):
            record |= {"nll": None, "failed": FAILED}
        records.append(record if label is None else {**record, "cluster": label})
    say_failed(records)
    return records


def shared_groups(documents: Sequence[Document]) -> list[str | None]:
    """The group of each document that has others in it, else None."""
    members = Counter(document.group for document in documents)
    return [document.group if members[document.group] > 1 else None for document in documents]


def say_failed(records: Sequence[Record]) -> None:
    """Name what could not be scored, in one line per set."""
    for line in failed_notes(records):
        say(line)


def last_word_windows(
    items: Sequence[LastWordItem], tokenizer: Any, limit: int | None = None
) -> tuple[list[LastWordItem], list[Window], list[str]]:
    """The items that this tokenizer can encode within the model's context, and their token sequences.

    Args:
        items: passages with their last words; the tokens of these are scored.
        tokenizer: a Hugging Face tokenizer.
        limit: most tokens that the model reads, or None.

    Returns:
        Items, windows, and for each item that is left out a line that names it.
    """
    kept: list[LastWordItem] = []
    windows: list[Window] = []
    left: list[str] = []
    for item in items:
        try:
            context, target = encode_item(item, tokenizer)
        except PreskipError as error:
            left.append(str(error))
            continue
        window = Window(context + target, len(context))
        if limit is not None and len(window.input_ids) > limit + 1:
            left.append(f"last-word item {item.id}: {len(window.input_ids) - 1} tokens exceed the context of {limit}")
            continue
        kept.append(item)
        windows.append(window)
    return kept, windows, left


def last_word_records(name: str, items: Sequence[LastWordItem], scores: Sequence[Score]) -> list[ItemRecord]:
    """One item record per last-word item of the set `name`, items of one group of documents a cluster.

    acc is 1 if every token of the target is the most likely one; nll is in nats, summed over the target's tokens.
    """
    records: list[ItemRecord] = []
    for item, score in zip(items, scores, strict=True):
        record: ItemRecord = {
            "set": name,
            "kind": "item",
            "id": item.id,
            "cluster": item.group,
            "scores": {"acc": int(score.greedy), "nll": score.nll},
            "tokens": score.tokens,
            "target": item.target,
        }
        if math.isnan(score.nll):
            record |= {"scores": {}, "failed": FAILED}
        records.append(record)
    say_failed(records)
    return records
