"""The records of one lm-eval task, out of the samples that lm-eval makes of a model's answers."""

from __future__ import annotations

import math
import numbers
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from preskip.evaluate.likelihood import Score
from preskip.evaluate.task_preparing import PreparedTask, document_sizes
from preskip.runs.schema import Record


def task_records(
    prepared: PreparedTask,
    scores: Sequence[Sequence[Score]],
    samples: Sequence[Mapping[str, Any]],
    reasons: Sequence[str | None],
) -> list[Record]:
    """Records of one task, from lm-eval's samples, one for each filter and document, and why one has no metrics."""
    task = prepared.task
    by_doc: dict[int, list[int]] = defaultdict(list)
    for position, instance in enumerate(task.instances):
        by_doc[instance.doc_id].append(position)
    by_filter: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    errors: dict[int, str | None] = {}
    for one, error in zip(samples, reasons, strict=True):
        place = len(by_filter[one["filter"]])
        errors[place] = errors.get(place) or error
        by_filter[one["filter"]].append(one)
    records: list[Record] = []
    for doc_id, (id, doc) in enumerate(prepared.docs):
        positions = sorted(by_doc[doc_id], key=lambda position: task.instances[position].idx)
        metrics: dict[str, Any] = {}
        for filter, several in by_filter.items():
            suffix = f",{filter}" if len(by_filter) > 1 else ""
            metrics |= {name + suffix: several[doc_id][name] for name in several[doc_id]["metrics"]}
        own = [score for position in positions for score in scores[position]]
        if error := errors[doc_id]:
            records.append(_failed(prepared.name, id, task, doc, own, error))
            continue
        records.append(_record(prepared.name, id, task, doc, metrics, own))
    return records


def aggregated_metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """Aggregated values by metric, without the filter's name where there is one filter only."""
    named = [(*key.rpartition(",")[::2], value) for key, value in values.items() if "," in key]
    several = len({filter for _, filter, _ in named}) > 1
    return {
        f"{metric},{filter}" if several else metric: float(value)
        for metric, filter, value in named
        if not metric.endswith("_stderr") and _is_number(value)
    }


def _record(name: str, id: str, task: Any, doc: Any, metrics: Mapping[str, Any], own: Sequence[Score]) -> Any:
    """The item's or document's `Record`."""
    head = {"set": name, "id": id, "cluster": None}
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        nll, tokens = sum(score.nll for score in own), sum(score.tokens for score in own)
        return {**head, "kind": "document", "nll": nll, "tokens": tokens, **document_sizes(task, doc, metrics)}
    scores = {key: float(value) for key, value in metrics.items() if _is_number(value)}
    if task.OUTPUT_TYPE == "loglikelihood":
        scores.pop("perplexity", None)  # per item it is the log-likelihood
        scores["nll"] = own[0].nll
    elif task.OUTPUT_TYPE == "multiple_choice" and (gold := _gold(task, doc)) is not None:
        scores["nll"] = own[gold].nll
    return {**head, "kind": "item", "scores": scores}


def _failed(name: str, id: str, task: Any, doc: Any, own: Sequence[Score], error: str) -> Any:
    """The `Record` of an item or document that has no score."""
    head = {"set": name, "id": id, "cluster": None, "failed": error}
    if task.OUTPUT_TYPE != "loglikelihood_rolling":
        return {**head, "kind": "item", "scores": {}}
    tokens = sum(score.tokens for score in own)
    return {
        **head,
        "kind": "document",
        "nll": None,
        "tokens": tokens,
        **document_sizes(task, doc, task.process_results(doc, [0.0])),
    }


def _gold(task: Any, doc: Any) -> int | None:
    """Which choice is right, where that is exactly one."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    if isinstance(gold, str) and gold in choices:
        return choices.index(gold)
    return gold if isinstance(gold, int) and 0 <= gold < len(choices) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (numbers.Real, np.bool_)) and math.isfinite(float(value))
