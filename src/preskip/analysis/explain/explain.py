"""`explain`: everything that explain.json says of a model's branches, from texts that are read once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from preskip.analysis.ablation import BOTH, PARTS, ablate, ablation_passes
from preskip.analysis.branches import LiveBranch, live_branches, skip_weight
from preskip.analysis.explain.attention import attention_changes
from preskip.analysis.explain.classes import Frequencies
from preskip.analysis.explain.forward import Measured, Recorder, measure
from preskip.analysis.explain.reading import SETS, Reading, Text, chunks
from preskip.analysis.explain.shown import Shown
from preskip.analysis.explain.spectrum import spectrum
from preskip.analysis.explain.sums import Sums, interval
from preskip.analysis.explain.tokens import TokenWriter
from preskip.analysis.explain.unembed import promoted_tokens
from preskip.data.blocks import scored_size, start_token, text_ids
from preskip.data.corpus import Document, numbered
from preskip.data.words import beginning
from preskip.errors import PreskipError
from preskip.evaluate.likelihood import default_batch_tokens, document_windows
from preskip.forwards import evaluating
from preskip.progress import Advance, no_progress
from preskip.quantizing import float_weight
from preskip.runs.explain_schema import (
    AttentionChanges,
    ExplainedLayer,
    ExplainedText,
    Explanation,
    LayerWeights,
    PromotedTokens,
)
from preskip.runs.schema import Limits

# bar(description, units): shows one stage, and gives what to call as it goes on.
Bar = Callable[[str, int], AbstractContextManager[Advance]]


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is read.

    Attributes:
        context_length: most tokens read at once.
        batch_tokens: padded tokens per forward pass; None for 512 on a processor, else 4,096.
        ablation_documents: held-out documents on which parts are switched off, 0 for none, else 2 or more.
        ablation_words: words of each, from its beginning: three passes per layer are costly.
        attention_documents: held-out documents whose first window tells how attention changes; 0 for none.
        shown_tokens: tokens of the bypass map; given texts come first.
    """

    context_length: int = 512
    batch_tokens: int | None = None
    ablation_documents: int = 8
    ablation_words: int = 40
    attention_documents: int = 8
    shown_tokens: int = 5000

    @property
    def most(self) -> int:
        """Texts of which ablation and attention together need the first ones."""
        return max(self.ablation_documents, self.attention_documents)

    def __post_init__(self) -> None:
        least_of = {"context_length": 2, "batch_tokens": 1, "ablation_words": 2}
        for name, value in vars(self).items():
            least = least_of.get(name, 0)
            if value is not None and value < least:
                raise PreskipError(f"--{name.replace('_', '-')} {value} is not possible: it must be at least {least}")
        if self.ablation_documents == 1:
            raise PreskipError("--ablation-documents 1: an interval takes 2 or more, 0 leaves ablation out")


def explain(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[Text],
    extent: Extent | None = None,
    *,
    reference: Iterable[str] | None = None,
    tokens: Path | None = None,
    bar: Bar | None = None,
) -> Explanation:
    """Measure what the branches of a model do.

    Memory does not grow with the number of texts, but for a few sums per document and layer.

    Args:
        model: a causal language model with branches, its own or of one active adapter, also a PEFT model.
        tokenizer: its tokenizer.
        texts: what to read; gone through more than once, so no generator. Statistics are of the held-out ones, of the
            given ones where there are no others.
        extent: how much is read.
        reference: texts that say how frequent each token is; None takes `texts`.
        tokens: where to write tokens.parquet; None for nowhere.
        bar: shows progress.

    Raises:
        PreskipError: no branch, several active adapters, no text, a text of fewer than 2 tokens, or a loss that is not
            finite.
    """
    extent = extent or Extent()
    bar = bar or (lambda description, units: nullcontext(no_progress))
    branches = _only_branches(model)
    counted = next((name for name in SETS if any(text.set == name for text in texts)), None)
    if counted is None:
        raise PreskipError("there is no text to read: give --text, or 1 or more --documents")
    timings: dict[str, float] = {}
    with evaluating(model):
        with _timed(timings, "read"):
            found = _read(model, tokenizer, texts, branches, extent, counted, reference, tokens, bar)
        with _timed(timings, "weights"):
            layers = [
                (_weights(branch), found.sums.layer(index), found.written(index, model, branch, tokenizer))
                for index, branch in enumerate(branches)
            ]
        some = list(islice((text for text in texts if text.set == counted), extent.most))
        with _timed(timings, "attention"):
            attention = _attention(model, tokenizer, some[: extent.attention_documents], branches, extent, bar)
        with _timed(timings, "ablation"):
            ablation = _ablation(model, tokenizer, some[: extent.ablation_documents], extent, bar)
    changed = any(row["entropy_change"] for row in attention)
    explained: list[ExplainedLayer] = [
        {**weights, **sizes, **written, **changes, "ablation": ablation.get(weights["layer"])}
        for (weights, sizes, written), changes in zip(layers, attention, strict=True)
    ]
    return {
        "texts": found.texts,
        "layers": explained,
        "classes": found.sums.classes(),
        "documents": found.shown.documents,
        "timings": {name: round(seconds, 2) for name, seconds in timings.items()},
        "method": {
            "statistics": counted,
            "context_length": extent.context_length,
            "frequency_tokens": found.frequencies.tokens,
            "attention_documents": min(extent.attention_documents, len(some)) if changed else 0,
            "ablation_documents": min(extent.ablation_documents, len(some)) if ablation else 0,
            "ablation_words": extent.ablation_words,
        },
    }


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What the pass over all texts gives."""

    sums: Sums
    shown: Shown
    texts: list[ExplainedText]
    recorder: Recorder
    frequencies: Frequencies

    def written(self, index: int, model: nn.Module, branch: LiveBranch, tokenizer: Any) -> PromotedTokens:
        """The tokens that a layer's mean skip output promotes and demotes; none without a skip."""
        total = self.recorder.written[index]
        if total is None or not self.recorder.counted:
            return {"promoted": [], "demoted": []}
        return promoted_tokens(model, branch, (total / self.recorder.counted).float(), tokenizer)


def _only_branches(model: nn.Module) -> list[LiveBranch]:
    branches = live_branches(model)
    if not branches:
        raise PreskipError("no layer has an active Preskip branch: there is nothing to explain")
    most = max(len(branch.active()) for branch in branches)
    if most > 1:
        raise PreskipError(f"{most} Preskip adapters are active: activate one with set_adapter")
    return branches


def _read(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[Text],
    branches: list[LiveBranch],
    extent: Extent,
    counted: str,
    reference: Iterable[str] | None,
    tokens: Path | None,
    bar: Bar,
) -> _Found:
    found = _Found(
        sums=Sums(len(branches)),
        shown=Shown(extent.shown_tokens),
        texts=[],
        recorder=Recorder(branches),
        frequencies=Frequencies(reference or (text.text for text in texts), tokenizer),
    )
    parts = {part for branch in branches for part in branch.parts}
    has = {"has_skip": "skip" in parts, "has_enrichment": "enrichment" in parts}
    writer = nullcontext() if tokens is None else TokenWriter(tokens, **has)
    total = len(texts) if isinstance(texts, Sized) else sum(1 for _ in texts)
    pieces = chunks(texts, tokenizer, found.frequencies, context_length=extent.context_length, counted=counted)
    size = extent.batch_tokens or default_batch_tokens(next(model.parameters()).device)
    before: float | None = None  # nats of the first token of the next window
    with found.recorder.recording(), writer as rows, bar("read", total) as advance:
        for measured in measure(model, found.recorder, pieces, batch_tokens=size):
            before = _take(measured, found, rows, counted, before)
            advance(measured.chunk.owner.index + 1, measured.chunk.owner.text.title[:30])
    return found


def _take(
    measured: Measured, found: _Found, rows: TokenWriter | None, counted: str, before: float | None
) -> float | None:
    """Add one window to everything that is kept; gives the nats of the token behind it."""
    chunk = measured.chunk
    reading: Reading = chunk.owner
    lead, first = chunk.lead, chunk.begin
    size = len(chunk.ids) - lead
    values = measured.values
    with np.errstate(divide="ignore", invalid="ignore"):
        bypass, enrichment = (
            np.where(values[below] > 0, values[above] / values[below], np.where(np.isnan(values[above]), np.nan, 0.0))
            for above, below in (("skip", "attention"), ("change", "input"))
        )
    bypass, enrichment = bypass[:, lead:], enrichment[:, lead:]
    # nll[i] is of the token behind the window's i-th.
    nll = [*([] if lead else [None]), *measured.nll.tolist()]
    if first > 0:  # with the window before it as context
        nll[0] = before
    if first == 0:
        found.texts.append(
            {
                "id": reading.text.id,
                "title": reading.text.title,
                "set": reading.text.set,
                "tokens": len(reading.ids),
                "shown": False,
                "group": reading.text.group,
            }
        )
    if found.shown.add(reading, first, bypass, enrichment):
        found.texts[-1]["shown"] = True
    if rows is not None:
        own = reading.ids[first : first + size]
        rows.write(reading.text.id, first, own, reading.table, nll[:size], bypass, enrichment)
    if reading.text.set == counted:
        labels = {name: column[first : first + size] for name, column in reading.table.labels.items()}
        found.sums.add(reading.text.group, values, labels)
    return nll[size] if len(nll) > size else None


def _weights(branch: LiveBranch) -> LayerWeights:
    """Norms and spectrum of one layer's matrices; None for those it lacks."""
    ((_, linears),) = branch.active()
    skip = skip_weight(linears)
    up, down = (float_weight(linears[part]).norm().item() if part in linears else None for part in ("up", "down"))
    return {
        "layer": branch.layer,
        "up_norm": up,
        "down_norm": down,
        "skip_norm": None if skip is None else skip.norm().item(),
        "null": None,
        **spectrum(skip),
    }


def _attention(
    model: nn.Module, tokenizer: Any, texts: list[Text], branches: list[LiveBranch], extent: Extent, bar: Bar
) -> list[AttentionChanges]:
    if not texts or not any("enrichment" in branch.parts for branch in branches):
        return [{"entropy_change": None, "sink_change": None} for _ in branches]
    start = start_token(tokenizer)
    lead = [] if start is None else [start]
    sequences = [[*lead, *text_ids(text.text, tokenizer)][: extent.context_length] for text in texts]
    with bar("attention patterns", len(sequences)) as advance:
        sums = attention_changes(model, branches, sequences, advance)
    of = numbered([text.group for text in texts])
    together = np.zeros((len(sums), max(of) + 1, 3))  # [layers, clusters, 3]
    for place, cluster in enumerate(of):
        together[:, cluster] += sums[:, place]
    return [
        {"entropy_change": interval(row[:, 0], row[:, 2]), "sink_change": interval(row[:, 1], row[:, 2])}
        for row in together
    ]


def _ablation(
    model: nn.Module, tokenizer: Any, texts: list[Text], extent: Extent, bar: Bar
) -> dict[int, dict[str, Limits | None]]:
    """By layer, what each part and both together are worth; empty with fewer than 2 clusters of texts."""
    if len({text.group for text in texts}) < 2:
        return {}
    documents = [Document(text.id, beginning(text.text, extent.ablation_words), text.group) for text in texts]
    length = extent.context_length
    windows, texts_of = document_windows(documents, tokenizer, context_length=length, stride=length)
    of = numbered([text.group for text in texts])
    owners = [of[owner] for owner in texts_of]
    sizes = np.bincount(of, [scored_size(document, tokenizer).bytes for document in documents]).tolist()
    parts = (*PARTS, BOTH)
    with bar("ablate", ablation_passes(model, windows, extent.batch_tokens, parts)) as advance:
        rows = ablate(model, windows, owners, sizes, parts=parts, batch_tokens=extent.batch_tokens, advance=advance)
    by_layer: dict[int, dict[str, Limits | None]] = {}
    for row in rows:
        own = by_layer.setdefault(row["layer"], dict.fromkeys(parts))
        own[row["part"]] = {"value": row["difference"], "low": row["low"], "high": row["high"]}
    return by_layer


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings[name] = time.perf_counter() - started
