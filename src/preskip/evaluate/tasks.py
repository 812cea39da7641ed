"""lm-eval tasks as per-item records: its prompts, filters and metrics, on many models in a row.

A `TaskSuite` loads the tasks, draws the sample and tokenises the requests once; `score` then costs the forward passes
only. Tasks whose data lie in the data directory (`preskip.data.local`) read them there, the rest from the Hub; nothing
else of a task's own definition is changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import numbers
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
import numpy as np
from lm_eval.utils import simple_parse_args_string
from torch import nn

from preskip.data.blocks import Window
from preskip.data.local import LocalData, data_directory
from preskip.data.wikitext import page_title
from preskip.errors import PreskipError, explained
from preskip.evaluate.harness import (
    GENERATED_AT_ONCE,
    Answers,
    LiveModel,
    RequestEncoder,
    model_context_length,
)
from preskip.evaluate.likelihood import FAILED, Score, say_failed, score_sequences
from preskip.evaluate.task_loading import load_tasks, quiet_lm_eval, seeded
from preskip.evaluate.task_settings import TaskSettings
from preskip.evaluate.texts import sample
from preskip.metrics import METRICS
from preskip.progress import Advance, no_progress
from preskip.runs.schema import Record, SetFacts

# What makes a task's prompts and metrics; the data have their own checksum.
_PROMPT_FIELDS = (
    *("task", "output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "process_docs", "process_results"),
    *("description", "target_delimiter", "fewshot_delimiter", "fewshot_config", "num_fewshot", "use_prompt"),
    *("gen_prefix", "metric_list", "filter_list", "generation_kwargs", "repeats"),
)
# lm-eval's default seeds: Python's, numpy's and torch's generators, and the choice of few-shot examples.
SEEDS = (0, 1234, 1234, 1234)
_AS_THEY_ARE = TaskSettings()


class TaskScores(NamedTuple):
    """What a model gets on all tasks.

    Args:
        records: one per item (or document), in a fixed order.
        metrics: `{task or group: {metric: value}}` as lm-eval aggregates them.
        lm_eval: what `lm_eval.evaluate` returns, with its samples.
    """

    records: list[Record]
    metrics: dict[str, dict[str, float]]
    lm_eval: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """One task, ready to be scored: `windows[i]` are the windows of `task.instances[i]` (none: it generates)."""

    name: str
    task: Any
    chosen: list[int] | None  # positions of the documents, None for all
    docs: list[tuple[str, Any]]  # id and document, in the order of the sample
    windows: list[list[Window]]
    facts: dict[str, Any]
    notes: list[str]  # what was left out, and why


class TaskSuite:
    """Some lm-eval tasks, prepared once for any number of models that share a tokenizer.

    Args:
        tasks: lm-eval task, group or tag names.
        tokenizer: a Hugging Face tokenizer.
        data_dir: see `preskip.data.local.data_directory`.
        limit: at most so many items of each task, drawn without replacement; None takes all.
        seed: of that draw.
        context_length: most tokens read at once; None takes the tokenizer's limit, else 2048 (lm-eval's default). Only
            requests that are longer, and whole documents, depend on it.
        settings: how lm-eval makes the prompts.
        seeds: of Python's, numpy's and torch's generators, and of the choice of few-shot examples.

    Attributes:
        sets: `{task: {...}}`, the evaluation sets as run.json describes them.
        facts: `{task: {...}}`, what lm-eval made: version, prompt hash, source and sample.
        size: how many sequences `score` reports to `advance`.

    Raises:
        PreskipError: unknown task, data that cannot be had, or a task that needs images or runs generated code.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        tokenizer: Any,
        *,
        data_dir: Path | str | None = None,
        limit: int | None = None,
        seed: int = 0,
        context_length: int | None = None,
        settings: TaskSettings = _AS_THEY_ARE,
        seeds: tuple[int, int, int, int] = SEEDS,
    ) -> None:
        if not tasks:
            raise PreskipError("no task: name at least one lm-eval task, such as lambada_openai")
        if limit is not None and limit < 1:
            raise PreskipError(f"limit of {limit} items: must be at least 1")
        self.tokenizer = tokenizer
        self.context_length = context_length or model_context_length(None, tokenizer)
        encoder = RequestEncoder(tokenizer, self.context_length)
        directory = data_directory(data_dir)
        self._settings, self._seeds = settings, seeds
        with quiet_lm_eval(), seeded(*seeds[:3]):
            loaded = load_tasks(tasks, directory, settings.include_path)
            self._groups = loaded.groups
            self._tasks = [
                _prepare(name, task, local, encoder, limit, seed, settings, seeds[3])
                for name, (task, local) in loaded.tasks.items()
            ]
        self.facts = {prepared.name: prepared.facts for prepared in self._tasks}
        self.sets = {prepared.name: _set_description(prepared, self.context_length) for prepared in self._tasks}
        self.size = sum(len(windows) for prepared in self._tasks for windows in prepared.windows)

    def requests(self, task: str) -> list[Any]:
        """lm-eval's own requests of a task, for another lm-eval model to answer."""
        return next(list(prepared.task.instances) for prepared in self._tasks if prepared.name == task)

    def score(
        self, model: nn.Module, *, batch_tokens: int | None = None, advance: Advance = no_progress
    ) -> list[Record]:
        """One record per item (or document), in a fixed order; see `evaluate`."""
        return self.evaluate(model, batch_tokens=batch_tokens, advance=advance)[0]

    def evaluate(
        self,
        model: nn.Module,
        *,
        batch_tokens: int | None = None,
        batch_size: int = GENERATED_AT_ONCE,
        bootstrap_iters: int = 0,
        advance: Advance = no_progress,
    ) -> TaskScores:
        """Score a model on all tasks; an item that cannot be scored is named (`failed`), and the others are kept.

        Arguments and errors are those of `score_sequences`; `advance` is called with sequences of `size`.

        Args:
            model: a causal language model.
            batch_tokens: see `score_sequences`.
            batch_size: texts that are generated at once.
            bootstrap_iters: of lm-eval's standard errors in `lm_eval`; 0 leaves them out.
            advance: progress.
        """
        windows = [window for prepared in self._tasks for several in prepared.windows for window in several]
        scores = iter(score_sequences(model, windows, batch_tokens=batch_tokens, advance=advance, keep_failed=True))
        live = LiveModel(model, self.tokenizer, context_length=self.context_length, batch_size=batch_size)
        own = [[[next(scores) for _ in several] for several in prepared.windows] for prepared in self._tasks]
        names = ", ".join(self.sets)
        with (
            explained(lambda error: f"lm-eval cannot score {names} ({_in_short(error)})"),
            quiet_lm_eval(),
            seeded(*self._seeds[:3]),
            _one_by_one([prepared.task for prepared in self._tasks]) as errors,
        ):
            results = self._lm_eval(live, own, bootstrap_iters)
        records: list[Record] = []
        for prepared, answers, reasons in zip(self._tasks, own, errors, strict=True):
            records += _records(prepared, answers, results["samples"][prepared.name], reasons)
        say_failed(records)
        aggregated = {**results["results"], **results.get("groups", {})}
        return TaskScores(records, {name: _metrics(values) for name, values in aggregated.items()}, results)

    def _lm_eval(self, live: LiveModel, scores: Sequence[Sequence[Sequence[Score]]], bootstrap_iters: int) -> Any:
        """lm-eval's own evaluator on requests that are answered already, but for generation."""
        answers: dict[int, Any] = {}
        for prepared, own in zip(self._tasks, scores, strict=True):
            for instance, several in zip(prepared.task.instances, own, strict=True):
                instance.resps, instance.filtered_resps = [], {}
                if instance.request_type == "loglikelihood":
                    answers[id(instance)] = (-several[0].nll, several[0].greedy)
                elif instance.request_type == "loglikelihood_rolling":
                    answers[id(instance)] = -sum(score.nll for score in several)
        return lm_eval.evaluate(
            Answers(live, answers),
            {"tasks": {prepared.name: prepared.task for prepared in self._tasks}, "groups": self._groups},
            samples={prepared.name: prepared.chosen for prepared in self._tasks if prepared.chosen is not None},
            bootstrap_iters=bootstrap_iters,
            system_instruction=self._settings.system_instruction,
            apply_chat_template=self._settings.apply_chat_template,
            fewshot_as_multiturn=self._settings.multiturn,
        )


def _prepare(
    name: str,
    task: Any,
    local: LocalData | None,
    encoder: RequestEncoder,
    limit: int | None,
    seed: int,
    settings: TaskSettings,
    fewshot_seed: int,
) -> _Prepared:
    # lm-eval's rule: a task that fixes 0 examples keeps it.
    own_fewshot = task.get_config("num_fewshot")
    if own_fewshot != 0:
        task.set_config(
            key="num_fewshot", value=settings.num_fewshot if settings.num_fewshot is not None else own_fewshot or 0
        )
    if settings.gen_kwargs and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=simple_parse_args_string(settings.gen_kwargs), update=True)
    task.set_fewshot_seed(seed=fewshot_seed)
    total = len(task.eval_docs)
    chosen = sample(total, limit, seed)
    is_sample = len(chosen) < total
    part_of_it = chosen if is_sample else None
    chat = settings.apply_chat_template

    def build(positions: list[int] | None) -> None:
        task.set_fewshot_seed(seed=fewshot_seed)
        task.build_all_requests(
            samples=positions,
            system_instruction=settings.system_instruction,
            apply_chat_template=chat,
            fewshot_as_multiturn=settings.multiturn,
            chat_template=encoder.apply_chat_template if chat else None,
            tokenizer_name=encoder.tokenizer_name if chat else "",
        )

    left: dict[int, str] = {}  # why, by the position of the document
    try:
        build(part_of_it)
    except PreskipError:
        raise
    except Exception as error:  # a task's templates and functions raise of every kind
        for position in chosen:
            try:
                build([position])
            except Exception as own:
                left[position] = f"its prompt cannot be made ({_in_short(own)})"
        if len(left) in (0, len(chosen)):
            raise PreskipError(
                f"task {name}: its prompts cannot be made ({_in_short(error)}): mend its task file, or change "
                "--num-fewshot and its like"
            ) from error
        chosen = [position for position in chosen if position not in left]
        build(chosen)
    windows, bad = _windows(task, encoder)
    if len(bad) == len(chosen):
        raise PreskipError(f"task {name}: no item can be scored: {next(iter(bad.values()))}")
    if bad:
        left |= {chosen[doc_id]: reason for doc_id, reason in bad.items()}
        kept = {old: new for new, old in enumerate(i for i in range(len(chosen)) if i not in bad)}
        pairs = [(one, own) for one, own in zip(task.instances, windows, strict=True) if one.doc_id in kept]
        for instance, _ in pairs:
            instance.doc_id = kept[instance.doc_id]
        task._instances, windows = [instance for instance, _ in pairs], [own for _, own in pairs]
        chosen = [chosen[old] for old in kept]
    task.build_all_requests = lambda **_: None  # lm-eval's evaluator would make them again for every model
    every = list(task.eval_docs)
    ids = _ids(name, task, every)
    docs = [(ids[index], every[index]) for index in chosen]
    config = task.dump_config()
    made_of = {key: config.get(key) for key in _PROMPT_FIELDS}
    if settings.system_instruction is not None:
        made_of["system_instruction"] = settings.system_instruction
    if chat:
        made_of |= {"chat_template": encoder.chat_template(True), "fewshot_as_multiturn": settings.multiturn}
    if task.get_config("num_fewshot") and fewshot_seed != SEEDS[3]:
        made_of["fewshot_seed"] = fewshot_seed
    prompts = json.dumps(made_of, sort_keys=True, default=str)
    path, part = task.get_config("dataset_path"), task.get_config("dataset_name")
    facts = {
        "version": task.VERSION,
        "num_fewshot": task.get_config("num_fewshot"),
        "prompt_sha256": hashlib.sha256(prompts.encode()).hexdigest(),
        "items": len(docs),
        "of": total,
        "sample_seed": seed if is_sample else None,
        "source": ", ".join(local.files) if local else f"Hugging Face data set {path}" + (f" ({part})" if part else ""),
        "title": local.name if local else name,
        "sha256": local.sha256 if local else _documents_hash(every),
    }
    return _Prepared(
        name=name,
        task=task,
        chosen=chosen if len(chosen) < total else None,
        docs=docs,
        windows=windows,
        facts=facts,
        notes=[f"{ids[position]!r} left out: {reason}" for position, reason in sorted(left.items())],
    )


@contextlib.contextmanager
def _one_by_one(tasks: Sequence[Any]) -> Iterator[list[list[str | None]]]:
    """Let no document end a task: one that cannot be scored has no metrics; per task why, or None, for each in turn."""

    def guarded(process: Any, reasons: list[str | None]) -> Any:
        def process_results(doc: Any, results: Any) -> Any:
            answers = [answer[0] if isinstance(answer, tuple) else answer for answer in results]
            if any(isinstance(answer, float) and math.isnan(answer) for answer in answers):
                reasons.append(FAILED)
                return {}
            try:
                metrics = process(doc, results)
            except Exception as error:  # a task's functions raise of every kind
                reasons.append(f"the task cannot score its answer ({_in_short(error)})")
                return {}
            reasons.append(None)
            return metrics

        return process_results

    before = [task.process_results for task in tasks]
    errors: list[list[str | None]] = [[] for _ in tasks]
    try:
        for task, process, reasons in zip(tasks, before, errors, strict=True):
            task.process_results = guarded(process, reasons)
        yield errors
    finally:
        for task, process in zip(tasks, before, strict=True):
            task.process_results = process


def _ids(name: str, task: Any, docs: Sequence[Any]) -> list[str]:
    """The data's own ids where they have unique ones (of a page: its title), else the task's name and the position."""
    if name == "wikitext":
        own = [page_title(doc["page"].strip().split("\n")[0]) for doc in docs]
    else:
        field = next((key for key in ("id", "ind") if all(key in doc for doc in docs)), None)
        own = [None if field is None else str(doc[field]) for doc in docs]
    counts = Counter(own)
    return [f"{name}#{i}" if id is None or counts[id] > 1 else id for i, id in enumerate(own)]


def _windows(task: Any, encoder: RequestEncoder) -> tuple[list[list[Window]], dict[int, str]]:
    """The windows of each instance, whatever kinds of request the task makes; why a document has none, by its number.

    Raises:
        PreskipError: the task makes no request.
    """
    windows: list[list[Window]] = []
    bad: dict[int, str] = {}
    for instance in task.instances:
        own: list[Window] = []
        try:
            match instance.request_type:
                case "loglikelihood":
                    own = encoder.loglikelihood([instance], disable_tqdm=True)
                case "loglikelihood_rolling":
                    (own,) = encoder.loglikelihood_rolling([instance])
                    if not own:
                        raise PreskipError("it is empty")
        except PreskipError as error:
            bad.setdefault(instance.doc_id, str(error))
        windows.append(own)
    return windows, bad


def _records(
    prepared: _Prepared,
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


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
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
        return {**head, "kind": "document", "nll": nll, "tokens": tokens, **_sizes(task, doc, metrics)}
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
        **_sizes(task, doc, task.process_results(doc, [0.0])),
    }


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _sizes(task: Any, doc: Any, metrics: Mapping[str, Any]) -> dict[str, int]:
    """Bytes and words of a document as the task counts them (wikitext: before its detokeniser)."""
    text = task.doc_to_target(doc)
    return {
        "bytes": metrics["byte_perplexity"][1] if "byte_perplexity" in metrics else task.count_bytes(text),
        "words": metrics["word_perplexity"][1] if "word_perplexity" in metrics else task.count_words(text),
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


def _set_description(prepared: _Prepared, context_length: int) -> SetFacts:
    facts, task = prepared.facts, prepared.task
    rolling = task.OUTPUT_TYPE == "loglikelihood_rolling"
    metrics = list(task.aggregation())
    accuracies = [name for name, metric in METRICS.items() if metric.is_accuracy and name in metrics]
    primary = [*accuracies, *metrics][0]
    filters = [filter.name for filter in getattr(task, "_filters", ())]
    primary += f",{filters[0]}" if len(filters) > 1 else ""
    tokens = sum(len(w.input_ids) - w.scored_from for several in prepared.windows for w in several)
    description: Any = {
        "kind": "document" if rolling else "item",
        "domain": "out",
        "title": f"{facts['title']} (lm-eval {prepared.name}, version {facts['version']})",
        "source": facts["source"],
        "sha256": facts["sha256"],
        "context_length": context_length,
        "stride": context_length if rolling else None,
        "documents" if rolling else "items": facts["items"],
        "primary": "bits_per_byte" if rolling else primary,
        "higher_is_better": {name: up for name, up in task.higher_is_better().items() if isinstance(up, bool)},
        "lm_eval": {key: facts[key] for key in ("version", "num_fewshot", "prompt_sha256", "of", "sample_seed")},
    }
    if prepared.notes:
        description["notes"] = prepared.notes
    if rolling:
        sizes = [_sizes(task, doc, task.process_results(doc, [0.0])) for _, doc in prepared.docs]
        description |= {"tokens": tokens, **{key: sum(size[key] for size in sizes) for key in ("bytes", "words")}}
    return description


def _documents_hash(docs: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for doc in docs:
        digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()
