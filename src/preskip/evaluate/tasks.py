"""lm-eval tasks as per-item records: its prompts, filters and metrics, on many models in a row.

A `TaskSuite` loads the tasks, draws the sample and tokenises the requests once; `score` then costs the forward passes
only. Tasks whose data lie in the data directory (`preskip.data.local`) read them there, the rest from the Hub; nothing
else of a task's own definition is changed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval
from torch import nn

from preskip.data.local import data_directory
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
from preskip.evaluate.task_preparing import SEEDS, in_short, prepare_task, set_facts
from preskip.evaluate.task_records import aggregated_metrics, task_records
from preskip.evaluate.task_settings import TaskSettings
from preskip.progress import Advance, no_progress
from preskip.runs.schema import Record

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
                prepare_task(name, task, local, encoder, limit, seed, settings, seeds[3])
                for name, (task, local) in loaded.tasks.items()
            ]
        self.facts = {prepared.name: prepared.facts for prepared in self._tasks}
        self.sets = {prepared.name: set_facts(prepared, self.context_length) for prepared in self._tasks}
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
            explained(lambda error: f"lm-eval cannot score {names} ({in_short(error)})"),
            quiet_lm_eval(),
            seeded(*self._seeds[:3]),
            _one_by_one([prepared.task for prepared in self._tasks]) as errors,
        ):
            results = self._lm_eval(live, own, bootstrap_iters)
        records: list[Record] = []
        for prepared, answers, reasons in zip(self._tasks, own, errors, strict=True):
            records += task_records(prepared, answers, results["samples"][prepared.name], reasons)
        say_failed(records)
        aggregated = {**results["results"], **results.get("groups", {})}
        return TaskScores(records, {name: aggregated_metrics(values) for name, values in aggregated.items()}, results)

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
                reasons.append(f"the task cannot score its answer ({in_short(error)})")
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
