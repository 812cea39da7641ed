"""Texts as evaluation sets: nats per document with a stated context and stride, prepared once for many models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from preskip.data.blocks import Window, keeps, opening_token, scored_size
from preskip.data.corpus import Document
from preskip.data.splits import load_texts, slug
from preskip.errors import PreskipError, some
from preskip.evaluate.likelihood import document_records, document_windows, score_sequences
from preskip.progress import Advance, no_progress
from preskip.runs.schema import Domain, Record, SetFacts
from preskip.stats.bootstrap import of_unequal_sizes


@dataclass(frozen=True, kw_only=True)
class TextSet:
    """Documents that are scored together.

    Attributes:
        name: of the evaluation set.
        documents: the texts.
        windows: what the model reads, for all documents.
        owners: for each window the index of its document.
        context_length: most tokens read at once.
        stride: tokens scored per window behind the first.
        notes: what was left out, and why.
        reopened: the start token that begins later windows of a document; None where there is none.
    """

    name: str
    documents: list[Document]
    windows: list[Window]
    owners: list[int]
    context_length: int
    stride: int
    notes: tuple[str, ...] = ()
    reopened: int | None = None

    def describe(self, tokenizer: Any, *, domain: Domain, title: str, source: str, sha256: str | None) -> SetFacts:
        """The set as run.json describes it."""
        sizes = [scored_size(document, tokenizer) for document in self.documents]
        by_group: Counter[Any] = Counter()
        for document, size in zip(self.documents, sizes, strict=True):
            by_group[document.group] += size.bytes
        groups = len(by_group)
        notes = list(self.notes)
        if without := sum(size.words == 0 for size in sizes):
            notes.append(f"no word perplexity: no spaces stand between the words of {without:,} of its documents")
        if lossy := sum(not keeps(tokenizer, document.text) for document in self.documents):
            notes.append(
                f"the tokenizer does not keep the text of {lossy:,} of its documents (unknown words, case, accents): "
                "bits per byte are too low and cannot be compared with those of another tokenizer"
            )
        if groups == 1 < len(self.documents):
            notes.append(
                "its documents are pieces of one text, or one group: they count as one, and no verdict is given; "
                "independent ones take form feeds between them, or rows of JSONL"
            )
        clusters: Any = {"clusters": groups} if groups < len(self.documents) else {}
        if groups > 1:
            shares = np.array(list(by_group.values())) / by_group.total()
            clusters["unit_freedom"] = of_unequal_sizes(shares)[0]
        return {
            "kind": "document",
            "domain": domain,
            "title": title,
            "source": source,
            "sha256": sha256,
            "context_length": self.context_length,
            "stride": self.stride,
            "reopened": self.reopened,
            "documents": len(self.documents),
            **clusters,
            "tokens": sum(len(window.input_ids) - window.scored_from for window in self.windows),
            "bytes": sum(size.bytes for size in sizes),
            "words": sum(size.words for size in sizes),
            "primary": "bits_per_byte",
            **({"notes": notes} if notes else {}),  # type: ignore[typeddict-item]
        }


def prepare_texts(
    name: str,
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    context_length: int,
    stride: int | None = None,
    reopen: bool = True,
) -> TextSet:
    """Cut documents into windows (`preskip.data.blocks.heldout_windows`); a stride of None is `context_length`.

    A document that gives no token to score is left out and named.

    Raises:
        PreskipError: a stride out of range.
    """
    stride = context_length if stride is None else stride
    windows, owners = document_windows(
        documents, tokenizer, context_length=context_length, stride=stride, reopen=reopen
    )
    scored = set(owners)
    notes = []
    if left := [repr(document.id) for number, document in enumerate(documents) if number not in scored]:
        notes = [f"{some(left, 1)} left out: the tokenizer gives no token to score"]
        places = {number: place for place, number in enumerate(sorted(scored))}
        documents, owners = [documents[number] for number in places], [places[number] for number in owners]
    return TextSet(
        name=name,
        documents=list(documents),
        windows=windows,
        owners=owners,
        context_length=context_length,
        stride=stride,
        notes=tuple(notes),
        reopened=opening_token(tokenizer) if reopen and len(windows) > len(scored) else None,
    )


def score_texts(
    model: nn.Module,
    texts: Sequence[TextSet],
    tokenizer: Any,
    *,
    batch_tokens: int | None = None,
    advance: Advance = no_progress,
    keep_failed: bool = False,
) -> list[Record]:
    """One record per document of some sets, in their order, with the tokenizer that they were prepared with.

    The other arguments and errors are those of `score_sequences`; `advance` is called with windows of all sets.
    """
    every = [window for text in texts for window in text.windows]
    scores = score_sequences(model, every, batch_tokens=batch_tokens, advance=advance, keep_failed=keep_failed)
    records: list[Record] = []
    for text in texts:
        own, scores = scores[: len(text.windows)], scores[len(text.windows) :]
        records += document_records(text.name, text.documents, text.owners, own, tokenizer)
    return records


def sample(total: int, limit: int | None, seed: int) -> list[int]:
    """Indices of at most `limit` of `total` documents or items, drawn without replacement and in order; None is all."""
    if limit is None or limit >= total:
        return list(range(total))
    return sorted(np.random.default_rng(seed).choice(total, size=limit, replace=False).tolist())


class TextSuite:
    """Some corpora, tokenised once for any number of models that share a tokenizer.

    Args:
        corpora: names as `preskip.data.splits.load_splits` takes them. Scored is the held-out part of a corpus with
            published parts (`wikitext2`, `books`, `books24`), every document of any other.
        tokenizer: a Hugging Face tokenizer.
        context_length: most tokens read at once.
        stride: tokens scored per window behind the first, 1 to `context_length`; None is `context_length`.
        limit: at most so many documents of each corpus, drawn without replacement; None takes all.
        seed: of that draw.
        data_dir: the data directory, or None.
        reopen: whether windows behind a document's first begin with the start token, where the tokenizer has one.
        text_column: column of rows, see `preskip.data.splits.load_texts`.
        split: of a data set in parts, see there.
        progress: show a progress bar while downloading.

    Attributes:
        sets: `{corpus: {...}}`, the evaluation sets as run.json describes them.
        size: how many sequences `score` reports to `advance`.

    Raises:
        PreskipError: a corpus that cannot be had, two of one name, or a stride out of range.
    """

    def __init__(
        self,
        corpora: Sequence[str],
        tokenizer: Any,
        *,
        context_length: int,
        stride: int | None = None,
        limit: int | None = None,
        seed: int = 0,
        data_dir: Path | None = None,
        text_column: str | None = None,
        split: str | None = None,
        reopen: bool = True,
        progress: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.sets: dict[str, SetFacts] = {}
        self._texts: list[TextSet] = []
        for given in corpora:
            name = slug(given)
            corpus = load_texts(given, data_dir=data_dir, text_column=text_column, split=split, progress=progress)
            if name in self.sets:
                raise PreskipError(f"two texts are named {name!r}: rename one of the files")
            documents = sorted(corpus.documents, key=lambda document: document.id)
            total = len(documents)
            documents = [documents[index] for index in sample(total, limit, seed)]
            text = prepare_texts(
                name, documents, tokenizer, context_length=context_length, stride=stride, reopen=reopen
            )
            self._texts.append(text)
            self.sets[name] = {
                **text.describe(tokenizer, domain="out", title=name, source=corpus.source, sha256=corpus.sha256),
                "sample": {"of": total, "seed": seed if len(documents) < total else None},
            }
        self.size = sum(len(text.windows) for text in self._texts)

    def score(
        self, model: nn.Module, *, batch_tokens: int | None = None, advance: Advance = no_progress
    ) -> list[Record]:
        """One record per document, in a fixed order; see `score_texts`."""
        return score_texts(
            model, self._texts, self.tokenizer, batch_tokens=batch_tokens, advance=advance, keep_failed=True
        )
