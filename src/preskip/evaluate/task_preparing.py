"""One lm-eval task made ready: its items chosen, their requests as token windows, and what is stored of them."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lm_eval.api.samplers import FirstNSampler
from lm_eval.utils import simple_parse_args_string

from preskip.data.blocks import Window
from preskip.data.local import LocalData
from preskip.data.wikitext import page_title
from preskip.errors import PreskipError, one_line
from preskip.evaluate.harness import RequestEncoder
from preskip.evaluate.task_settings import TaskSettings
from preskip.evaluate.texts import sample
from preskip.metrics import METRICS
from preskip.runs.schema import SetFacts

# What makes a task's prompts and metrics; the data have their own checksum.
_PROMPT_FIELDS = (
    *("task", "output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "process_docs", "process_results"),
    *("description", "target_delimiter", "fewshot_delimiter", "fewshot_config", "num_fewshot", "use_prompt"),
    *("gen_prefix", "metric_list", "filter_list", "generation_kwargs", "repeats"),
)
_LM_EVAL_FACTS = ("version", "num_fewshot", "examples_drawn", "prompt_sha256", "of", "sample_seed")
# lm-eval's default seeds: Python's, numpy's and torch's generators, and the choice of few-shot examples.
SEEDS = (0, 1234, 1234, 1234)


@dataclass(frozen=True, kw_only=True)
class PreparedTask:
    """One task, ready to be scored: `windows[i]` are the windows of `task.instances[i]` (none: it generates)."""

    name: str
    task: Any
    chosen: list[int] | None  # positions of the documents, None for all
    docs: list[tuple[str, Any]]  # id and document, in the order of the sample
    windows: list[list[Window]]
    facts: dict[str, Any]
    notes: list[str]  # what was left out, and why


def prepare_task(
    name: str,
    task: Any,
    local: LocalData | None,
    encoder: RequestEncoder,
    limit: int | None,
    seed: int,
    settings: TaskSettings,
    fewshot_seed: int,
) -> PreparedTask:
    """Choose a task's items, make their prompts and tokenise them; an item that cannot be made is noted and left out.

    Args:
        name: of the task.
        task: lm-eval's object; it is set up and changed.
        local: the local data that it reads, or None.
        encoder: tokenises.
        limit: most items, a fixed random sample; None for all.
        seed: of that sample.
        settings: how the prompts are made.
        fewshot_seed: of the choice of examples.

    Raises:
        PreskipError: no prompt can be made, or no item can be scored.
    """
    _configure(task, settings)
    total = len(task.eval_docs)
    chosen = sample(total, limit, seed)
    is_sample = len(chosen) < total
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

    encoder.left_out_system = False
    left: dict[int, str] = {}  # why, by the position of the document
    try:
        build(chosen if is_sample else None)
    except PreskipError:
        raise
    except Exception as error:  # a task's templates and functions raise of every kind
        left = _unmakeable(build, chosen)
        if len(left) in (0, len(chosen)):
            raise PreskipError(
                f"task {name}: its prompts cannot be made ({in_short(error)}): mend its task file, or change "
                "--num-fewshot and its like"
            ) from error
        chosen = [position for position in chosen if position not in left]
        build(chosen)
    windows, bad = _windows(task, encoder)
    if len(bad) == len(chosen):
        raise PreskipError(f"task {name}: no item can be scored: {next(iter(bad.values()))}")
    if bad:
        left |= {chosen[number]: reason for number, reason in bad.items()}
        windows = _keep(task, windows, [number for number in range(len(chosen)) if number not in bad])
        chosen = [position for position in chosen if position not in left]
    task.build_all_requests = lambda **_: None  # lm-eval's evaluator would make them again for every model
    every = list(task.eval_docs)
    ids = _ids(name, task, every)
    docs = [(ids[index], every[index]) for index in chosen]
    path, part = task.get_config("dataset_path"), task.get_config("dataset_name")
    facts = {
        "version": task.VERSION,
        "num_fewshot": task.get_config("num_fewshot"),
        "examples_drawn": _draws_examples(task),
        "prompt_sha256": _prompt_sha256(task, encoder, settings, fewshot_seed),
        "items": len(docs),
        "of": total,
        "sample_seed": seed if is_sample else None,
        "source": ", ".join(local.files) if local else f"Hugging Face data set {path}" + (f" ({part})" if part else ""),
        "title": local.name if local else name,
        "sha256": local.sha256 if local else _documents_hash(every),
    }
    notes = ["the chat template takes no system message: left out"] if encoder.left_out_system else []
    notes += [f"{ids[position]!r} left out: {reason}" for position, reason in sorted(left.items())]
    return PreparedTask(
        name=name,
        task=task,
        chosen=chosen if len(chosen) < total else None,
        docs=docs,
        windows=windows,
        facts=facts,
        notes=notes,
    )


def _configure(task: Any, settings: TaskSettings) -> None:
    own_fewshot = task.get_config("num_fewshot")
    if own_fewshot != 0:  # lm-eval's rule: a task that fixes 0 examples keeps it
        wanted = own_fewshot or 0 if settings.num_fewshot is None else settings.num_fewshot
        task.set_config(key="num_fewshot", value=wanted)
    if settings.gen_kwargs and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=simple_parse_args_string(settings.gen_kwargs), update=True)


def _draws_examples(task: Any) -> bool:
    """Whether few-shot examples are drawn at random: one item after another, so that an item's depend on the sample."""
    return bool(task.get_config("num_fewshot")) and not isinstance(getattr(task, "sampler", None), FirstNSampler)


def _unmakeable(build: Callable[[list[int]], None], positions: Sequence[int]) -> dict[int, str]:
    """The documents whose prompt cannot be made, by position, and why."""
    left = {}
    for position in positions:
        try:
            build([position])
        except Exception as error:
            left[position] = f"its prompt cannot be made ({in_short(error)})"
    return left


def _keep(task: Any, windows: Sequence[list[Window]], kept: Sequence[int]) -> list[list[Window]]:
    """Leave in a task the documents of these numbers, which are numbered anew; their windows."""
    numbers = {old: new for new, old in enumerate(kept)}
    pairs = [(one, own) for one, own in zip(task.instances, windows, strict=True) if one.doc_id in numbers]
    for instance, _ in pairs:
        instance.doc_id = numbers[instance.doc_id]
    task._instances = [instance for instance, _ in pairs]
    return [own for _, own in pairs]


def _prompt_sha256(task: Any, encoder: RequestEncoder, settings: TaskSettings, fewshot_seed: int) -> str:
    """Checksum of everything that makes a task's prompts and metrics; of a function its source, the same everywhere."""
    config = task.config.to_dict(keep_callable=True)
    made_of = {key: config.get(key) for key in _PROMPT_FIELDS}
    if settings.system_instruction is not None:
        made_of["system_instruction"] = settings.system_instruction
    if settings.apply_chat_template:
        made_of |= {"chat_template": encoder.chat_template(True), "fewshot_as_multiturn": settings.multiturn}
    if task.get_config("num_fewshot") and fewshot_seed != SEEDS[3]:
        made_of["fewshot_seed"] = fewshot_seed
    prompts = json.dumps(made_of, sort_keys=True, default=_written)
    return hashlib.sha256(prompts.encode()).hexdigest()


def _written(value: Any) -> Any:
    """What JSON does not know, without its address in this process: lm-eval has functions in the fields of a field."""
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return str(value)


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


def document_sizes(task: Any, doc: Any, metrics: Mapping[str, Any]) -> dict[str, int]:
    """Bytes and words of a document as the task counts them (wikitext: before its detokeniser)."""
    text = task.doc_to_target(doc)
    return {
        "bytes": metrics["byte_perplexity"][1] if "byte_perplexity" in metrics else task.count_bytes(text),
        "words": metrics["word_perplexity"][1] if "word_perplexity" in metrics else task.count_words(text),
    }


def set_facts(prepared: PreparedTask, context_length: int) -> SetFacts:
    """A task as an evaluation set, for run.json."""
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
        "lm_eval": {key: facts[key] for key in _LM_EVAL_FACTS},
    }
    if prepared.notes:
        description["notes"] = prepared.notes
    if rolling:
        sizes = [document_sizes(task, doc, task.process_results(doc, [0.0])) for _, doc in prepared.docs]
        description |= {"tokens": tokens, **{key: sum(size[key] for size in sizes) for key in ("bytes", "words")}}
    return description


def _documents_hash(docs: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for doc in docs:
        digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def in_short(error: BaseException) -> str:
    """The kind of an error and its beginning, in one line."""
    return f"{type(error).__name__}: {one_line(error, 160)}"
