"""lm-eval's task objects by name, with local files in place of the Hub where the data directory has them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from preskip.data.local import LocalData, load_local
from preskip.errors import PreskipError, one_line
from preskip.evaluate.task_names import check_tasks, unknown_task

# Where lm-eval keeps the tasks that have local data: scanning all of its 14,000 files takes seconds.
_FOLDERS = {"lambada_openai": "lambada", "wikitext": "wikitext", "arc_easy": "arc", "hellaswag": "hellaswag"}


class Loaded(NamedTuple):
    """Tasks in the order asked for, groups and tags resolved.

    Args:
        tasks: lm-eval's task object and the local data that it reads (None: from elsewhere), by the task's name.
        groups: lm-eval's groups among what was asked for, by name.
    """

    tasks: dict[str, tuple[Any, LocalData | None]]
    groups: dict[str, Any]


def load_tasks(names: Sequence[str], directory: Path | None, include_path: str | None = None) -> Loaded:
    """Load lm-eval's tasks, groups and tags.

    Args:
        names: of tasks, groups or tags, or paths of task files.
        directory: the data directory.
        include_path: folder of task files that go before lm-eval's own of the same name.

    Raises:
        PreskipError: unknown task, data that cannot be had, or a task that needs images or runs generated code.
    """
    if include_path and not Path(include_path).is_dir():
        raise PreskipError(f"--include-path {include_path}: no such folder")
    check_tasks(names, include_path)
    loaded: dict[str, tuple[Any, LocalData | None]] = {}
    groups: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        local = None
        if include_path and _is_own(name, include_path):
            found = _load_own(name, include_path)
        else:
            local = load_local(name, directory)
            found = _find(name, local, include_path)
        loaded |= {leaf: (task, local) for leaf, task in found["tasks"].items() if leaf not in loaded}
        if not local:
            groups |= found.get("groups", {})
    order = [*groups, *loaded]
    if repeated := next((name for name in order if order.count(name) > 1), None):
        raise PreskipError(f"{repeated!r} names a group and a task: rename one of them")
    for name, (task, _) in loaded.items():
        if getattr(task, "MULTIMODAL", False):
            raise PreskipError(f"task {name} needs images or sound: only text tasks can be evaluated")
        if getattr(task, "UNSAFE_CODE", False):
            raise PreskipError(f"task {name} runs the code that a model writes: this is refused; use lm-eval itself")
    return Loaded(loaded, groups)


def _is_own(name: str, include_path: str) -> bool:
    """Whether the user's folder has a task or group of this name."""
    own = _task_manager(None, include_path)
    return name in own.task_index and name not in own.all_tags


def _load_own(name: str, include_path: str) -> Any:
    own = _task_manager(None, include_path)
    try:
        return own.load([name])
    except Exception as error:  # task files and their functions raise of every kind
        if name in own.all_groups:  # a group of the user's may hold tasks of lm-eval's
            return _load(_task_manager(None, include_path, defaults=True), name)
        raise PreskipError(
            f"task {name} of {include_path} cannot be loaded ({type(error).__name__}: {one_line(error, 160)}): mend "
            "its file, or its data"
        ) from error


def _find(name: str, local: LocalData | None, include_path: str | None) -> Any:
    if local:
        return _task_manager(_FOLDERS[name]).load([_with_local_data(name, local)])
    manager = _task_manager(None, include_path, defaults=True)
    is_file = name.endswith((".yaml", ".yml")) and Path(name).is_file()
    if name not in manager.task_index and not is_file:
        raise unknown_task(name, manager.all_tasks)
    return _load(manager, name)


@cache
def _task_manager(folder: str | None, include_path: str | None = None, *, defaults: bool = False) -> Any:
    """lm-eval's index of one folder of its own tasks, or of the user's folder, with or without all of its own."""
    import lm_eval.tasks

    if folder is not None:
        include_path = str(Path(lm_eval.tasks.__file__).parent / folder)
    return lm_eval.tasks.TaskManager(include_path=include_path, include_defaults=defaults)


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


def _load(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except ImportError as error:
        raise PreskipError(f"task {name} needs another package: {one_line(error, 200)}") from error
    except Exception as error:  # the Hub client and lm-eval raise many kinds, from several libraries
        raise PreskipError(
            f"the data of task {name} are neither in the data directory nor to be had from the Hub "
            f"({type(error).__name__}: {one_line(error, 160)}): go online, or give --data-dir"
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


@contextlib.contextmanager
def seeded(python: int, numpy: int, torch: int) -> Iterator[None]:
    """Seed the generators that tasks and sampled generation draw from, and put them back afterwards."""
    import random

    import numpy as np
    from torch import manual_seed
    from torch.random import fork_rng

    # Tasks draw from numpy's global generator, too.
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with fork_rng():
        random.seed(python)
        np.random.seed(numpy)  # noqa: NPY002
        manual_seed(torch)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
