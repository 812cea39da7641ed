"""What the dtype alone costs: the untouched base in fp32, with bf16 weights, and in fp32 under bf16 autocast.

A gain over a base that rounding has damaged may be repair and not learning, so a bf16 comparison needs this figure
beside it. The three are scored on the same items and compared in pairs; where EleutherAI published a figure of the
model (`preskip.evaluate.published`), each one's distance to it is given.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from preskip.assets import load_model
from preskip.data.blocks import check_vocabulary
from preskip.errors import PreskipError
from preskip.evaluate.likelihood import check_causal
from preskip.evaluate.published import accuracy_distance, perplexity_distance, published_figures, recognise_published
from preskip.evaluate.texts import TextSet, score_texts
from preskip.progress import progress_bar, say, spinner
from preskip.runs.schema import DtypeAudit, Family, PublishedAudit, Record
from preskip.stats import ALPHA, DEFAULT_MARGINS, apply_family, compare, summarise

if TYPE_CHECKING:
    from preskip.evaluate.tasks import TaskSuite

# What is held against each other: dtype of the weights, and whether bf16 autocast computes.
DTYPES = {"float32": ("float32", False), "autocast": ("float32", True), "bfloat16": ("bfloat16", False)}
REFERENCE = "float32"


@dataclass(frozen=True, kw_only=True)
class Audited:
    """What came out: item records by dtype of `DTYPES`, and the report, as controls/dtype-audit.json stores it."""

    records: dict[str, list[Record]]
    report: DtypeAudit


def dtype_audit(
    model_name: str,
    tokenizer: Any,
    *,
    texts: Sequence[TextSet] = (),
    suite: TaskSuite | None = None,
    device: str = "cpu",
    published: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    batch_tokens: int | None = None,
    known: Mapping[str, list[Record]] = MappingProxyType({}),
    quiet: bool = True,
) -> Audited:
    """Score the untouched base in each dtype of `DTYPES`.

    The weights are loaded anew for bf16, not cast: a cast would round buffers too, which a user's model keeps in fp32.

    Args:
        model_name: see `preskip.assets.load_model`.
        tokenizer: its Hugging Face tokenizer.
        texts: sets for bits per byte, of two documents or more each, prepared with that tokenizer.
        suite: lm-eval tasks, such as lambada_openai; None for none.
        device: "cpu" or "cuda".
        published: name of a published model, such as pythia-160m; None finds it by the model's name.
        attn_implementation: as in transformers; None for its default.
        trust_remote_code: allow code of the model's repository to run.
        revision: see `preskip.assets.resolve_model`.
        batch_tokens: upper bound of padded tokens per forward pass.
        known: records of a dtype of `DTYPES` that are there already, as this would make them.
        quiet: no progress.

    Raises:
        PreskipError: nothing to score, no such published model, a model that is not causal, or a NaN.
    """
    if not texts and suite is None:
        raise PreskipError("nothing to audit: give texts or a task")
    if published is not None:
        published_figures(published)  # an unknown name is found before the model is loaded
    windows = sum(len(text.windows) for text in texts)
    total = windows + (suite.size if suite else 0)

    def score(model: nn.Module, label: str) -> list[Record]:
        with progress_bar(f"score in {label}", total, quiet=quiet) as advance:
            records = score_texts(model, texts, tokenizer, batch_tokens=batch_tokens, advance=advance, keep_failed=True)
            if suite is not None:
                records += suite.score(
                    model, batch_tokens=batch_tokens, advance=lambda done, note: advance(windows + done, note)
                )
        return records

    records: dict[str, list[Record]] = {}
    seconds: dict[str, float] = {}
    model: Any = None
    loaded = None
    family: Family = {"declared": [], "alpha": ALPHA, "margins": DEFAULT_MARGINS}
    for label, (weights, autocasts) in DTYPES.items():
        if weights != loaded:
            model = None
            gc.collect()  # two copies of a large model may not fit
            with spinner(f"loading {model_name} in {weights}", quiet=quiet):
                model = load_model(
                    model_name, getattr(torch, weights), device, attn_implementation, trust_remote_code, revision
                )
            loaded = weights
        if label == REFERENCE:
            check_vocabulary(model, tokenizer)
            check_causal(model)
            rounded = _share_rounded(model)
            name = published or recognise_published(model_name, model.config)
        if label in known:
            records[label] = known[label]
            continue
        started = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16) if autocasts else nullcontext():
            records[label] = score(model, label)
        seconds[label] = round(time.perf_counter() - started, 2)
    notes: list[str] = []
    report: DtypeAudit = {
        "model": model_name,
        "device": device,
        "attn_implementation": model.config._attn_implementation,
        "weights_rounded": rounded,
        "context_length": texts[0].context_length if texts else None,
        "dtypes": {
            label: {
                "weights": weights,
                "computes": "bfloat16" if autocasts else weights,
                **({"seconds": seconds[label]} if label in seconds else {}),  # type: ignore[typeddict-item]
                "metrics": summarise(records[label], notes=notes),
            }
            for label, (weights, autocasts) in DTYPES.items()
        },
        "comparisons": [
            entry
            for label in DTYPES
            if label != REFERENCE
            for entry in apply_family(
                compare(records[label], records[REFERENCE], arm=label, reference=REFERENCE, notes=notes),
                family,
                suite.sets if suite else {},
            )
        ],
        "published": None if name is None else _published(name, records),
    }
    for note in dict.fromkeys(notes):
        say(note, quiet=quiet)
    return Audited(records=records, report=report)


def _share_rounded(model: nn.Module) -> float:
    """Share of the weights that change when they are rounded to bf16."""
    changed = total = 0
    for parameter in model.parameters():
        changed += int((parameter.detach() != parameter.detach().bfloat16().float()).sum())
        total += parameter.numel()
    return changed / total


def _published(name: str, records: dict[str, list[Record]]) -> PublishedAudit:
    """Each dtype's distance to the published figures, for every task that both have."""
    figures = published_figures(name)
    distances: dict[str, Any] = {}
    for label, rows in records.items():
        for task, values in figures.tasks.items():
            items = [row for row in rows if row["kind"] == "item" and row["set"] == task]
            own = [row["scores"] for row in items if "failed" not in row]
            for metric in ("acc", "acc_norm"):
                if own and metric in values and metric in own[0]:
                    right = sum(int(scores[metric]) for scores in own)
                    found = accuracy_distance(right, len(own), values[metric])
                    distances.setdefault(label, {}).setdefault(task, {})[metric] = found
            if own and "ppl" in values:
                found = perplexity_distance([scores["nll"] for scores in own], values["ppl"])
                distances.setdefault(label, {}).setdefault(task, {})["ppl"] = found
    return {"model": name, "checkpoint": figures.checkpoint, "source": figures.source, "distances": distances}
