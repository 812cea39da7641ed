"""lm-eval's task objects by name, with local files in place of the Hub where the data directory has them."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from preskip.data.local import LocalData, load_local
from preskip.errors import PreskipError

# Where lm-eval keeps the tasks that have local data: scanning all of its 14,000 files takes seconds.
_FOLDERS = {"lambada_openai": "lambada", "wikitext": "wikitext", "arc_easy": "arc", "hellaswag": "hellaswag"}


def load_tasks(names: Sequence[str], directory: Path | None) -> dict[str, tuple[Any, LocalData | None]]:
    """Load lm-eval's tasks, groups and tags resolved, in the order asked for.

    Returns:
        lm-eval's task object and the local data that it reads (None: from the Hub), by the task's name.

    Raises:
        PreskipError: unknown task, data that cannot be had, or a task that needs images or runs generated code.
    """
    loaded: dict[str, tuple[Any, LocalData | None]] = {}
    for name in dict.fromkeys(names):
        local = load_local(name, directory)
        manager = _task_manager(_FOLDERS[name] if local else None)
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=4)
            hint = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
            raise PreskipError(f"unknown task {name!r}: {hint}")
        found = manager.load([_with_local_data(name, local)]) if local else _load_from_hub(manager, name)
        loaded |= {leaf: (task, local) for leaf, task in found["tasks"].items()}
    for name, (task, _) in loaded.items():
        if getattr(task, "MULTIMODAL", False):
            raise PreskipError(f"task {name} needs images or sound: only text tasks can be evaluated")
        if getattr(task, "UNSAFE_CODE", False):
            raise PreskipError(f"task {name} runs the code that a model writes: this is refused; use lm-eval itself")
    return loaded


@cache
def _task_manager(folder: str | None) -> Any:
    import lm_eval.tasks

    if folder is None:
        return lm_eval.tasks.TaskManager()
    return lm_eval.tasks.TaskManager(include_path=Path(lm_eval.tasks.__file__).parent / folder, include_defaults=False)


def _with_local_data(name: str, local: LocalData) -> dict[str, Any]:
    """The task's own definition with its data set replaced, and the splits that the local data lack left out.

    A group of one, because lm-eval lets a group's members, not a single task, override parts of what is registered.
    """
    import datasets

    def build(**_: Any) -> dict[str, Any]:
        return {split: datasets.Dataset.from_list(rows) for split, rows in local.splits.items()}

    kinds = ("training", "validation", "test")
    lacking = {f"{kind}_split": None for kind in kinds if {"training": "train"}.get(kind, kind) not in local.splits}
    return {"group": f"local_{name}", "task": [{"task": name, "custom_dataset": build, **lacking}]}


def _load_from_hub(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except ImportError as error:
        raise PreskipError(f"task {name} needs another package: {' '.join(str(error).split())[:200]}") from error
    except Exception as error:  # the Hub client and lm-eval raise many kinds, from several libraries
        reason = " ".join(str(error).split())[:160]
        raise PreskipError(
            f"the data of task {name} are neither in the data directory nor to be had from the Hub "
            f"({type(error).__name__}: {reason}): go online, or give --data-dir"
        ) from error


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Keep lm-eval's and datasets' notices and bars off the terminal; errors are raised, not printed."""
    import datasets
    import lm_eval.api.task as tasks
    from tqdm import tqdm

    logger = logging.getLogger("lm_eval")
    level, bars, bar = logger.level, datasets.is_progress_bar_enabled(), tasks.tqdm
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    tasks.tqdm = lambda *args, **options: tqdm(*args, **{**options, "disable": True})  # it has no switch of its own
    try:
        yield
    finally:
        logger.setLevel(level)
        tasks.tqdm = bar
        if bars:
            datasets.enable_progress_bars()
