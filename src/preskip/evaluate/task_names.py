"""Unknown lm-eval tasks, found in the text of its task files: parsing all 14,000 of them takes half a minute."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from preskip.errors import PreskipError

_NAME = re.compile(rb"""^[ \t-]*["']?(?:task|group|tag)["']?[ \t]*:[ \t]*["']?([^\s"'#\[\]]+)""", re.MULTILINE)


def check_tasks(names: Sequence[str], include_path: str | None = None) -> None:
    """Refuse names that stand in no task file; one that stands there may still be none of a task.

    Args:
        names: of tasks, groups or tags, or paths of task files.
        include_path: folder of the user's own task files, or None.

    Raises:
        PreskipError: an unknown one, with names like it.
    """
    wanted = {name for name in names if not (name.endswith((".yaml", ".yml")) and Path(name).is_file())}
    missing = {name: re.compile(rb"(?<![\w.-])" + re.escape(name.encode()) + rb"(?![\w.-])") for name in wanted}
    found: set[str] = set()
    for content in _task_files(wanted, include_path):
        missing = {name: pattern for name, pattern in missing.items() if not pattern.search(content)}
        if not missing:
            return
        found.update(name.decode(errors="replace") for name in _NAME.findall(content))
    for name in names:
        if name in missing:
            raise unknown_task(name, found)


def unknown_task(name: str, known: Collection[str]) -> PreskipError:
    """The error for a name that is not among the known ones."""
    close = difflib.get_close_matches(name, sorted(known), n=4)
    hint = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
    return PreskipError(f"unknown task {name!r}: {hint}")


def _task_files(names: set[str], include_path: str | None) -> Iterator[bytes]:
    """All task files and what they include, those in whose path a name's first word stands first."""
    spec = importlib.util.find_spec("lm_eval")
    roots = [include_path] if include_path else []
    roots += [os.path.join(place, "tasks") for place in (spec and spec.submodule_search_locations) or ()]
    words = [re.split(r"[_:-]", name)[0] for name in names]
    later: list[str] = []
    for root in roots:
        for folder, _, files in os.walk(root):
            is_likely = any(word in folder for word in words)
            for file in files:
                if "yaml" in file or "yml" in file:
                    path = os.path.join(folder, file)
                    if is_likely:
                        yield _read(path)
                    else:
                        later.append(path)
    yield from map(_read, later)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
