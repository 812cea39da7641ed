"""Whether a stored value is what a type of the schema says: no key unknown or missing, each of its type."""

from __future__ import annotations

import types
from collections.abc import Hashable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NotRequired, Union, get_args, get_origin

from typing_extensions import get_type_hints, is_typeddict

from preskip.runs import explain_schema, schema
from preskip.runs.files import read_json, read_jsonl


def faults(value: Any, kind: Any, place: str = "") -> Iterator[str]:
    """One line for each thing that does not conform.

    Args:
        value: as read from JSON.
        kind: a TypedDict, or a type that its keys are declared with.
        place: where in the file the value stands.
    """
    if is_typeddict(kind):
        if not isinstance(value, dict):
            yield f"{place}: {type(value).__name__} in place of {kind.__name__}"
            return
        hints = _hints(kind)
        yield from (f"{place}: unknown key {key!r} of {kind.__name__}" for key in value.keys() - hints.keys())
        for key, own in hints.items():
            if key in value:
                yield from faults(value[key], _inner(own), f"{place}.{key}")
            elif get_origin(own) is not NotRequired and key in kind.__required_keys__:
                yield f"{place}: lacks {key!r} of {kind.__name__}"
        return
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        found = [list(faults(value, one, place)) for one in inner if value is None or one is not types.NoneType]
        if all(found):
            yield from min(found, key=len)
    elif origin is list and isinstance(value, list):
        for index, one in enumerate(value):
            yield from faults(one, inner[0], f"{place}[{index}]")
    elif origin is dict and isinstance(value, dict):
        for key, one in value.items():
            yield from faults(one, inner[1], f"{place}.{key}")
    elif origin is Literal:
        if value not in inner:
            yield f"{place}: {value!r} is none of {', '.join(map(repr, inner))}"
    elif kind is not Any and (origin is not None or not _is_a(value, kind)):
        yield f"{place}: {value!r:.40} in place of {kind}"


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _inner(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is NotRequired else kind


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):  # a kind of int to Python, not to JSON
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


# The files of a run, by their place in it.
RUN_FILES: dict[str, Any] = {
    "run.json": schema.Manifest,
    "data/heldout.json": list[schema.HeldOutSet],
    "arms/*/*/items.jsonl": schema.Record,
    "arms/*/*/train.jsonl": schema.StepRow,
    "arms/*/*/cell.json": schema.CellSummary,
    "search/*/*/*/*/train.jsonl": schema.StepRow,
    "search/*/*/*/*/trial.json": schema.Trial,
    "search/*/*/search.json": schema.Search,
    "search/*/rung-*/*/train.jsonl": schema.StepRow,  # as the next two of a search that served all seeds
    "search/*/rung-*/*/trial.json": schema.Trial,
    "search/*/search.json": schema.Search,
    "controls/*/*/*/train.jsonl": schema.StepRow,
    "controls/*/*/*/cell.json": schema.ControlSummary,
    "controls/dtype-audit.json": schema.DtypeAudit,
    "results.json": schema.Results,
    "explain/*/explain.json": explain_schema.Explain,
}


def file_faults(path: Path, kind: Any) -> Iterator[str]:
    """The faults of a file: of its value, or where it ends in .jsonl of the first line of each `_form`."""
    path = path.with_name(path.name.removesuffix(".gz"))
    values = read_jsonl(path) if path.suffix == ".jsonl" else [read_json(path)]
    literals, known = frozenset(_literals(kind)), set()
    for number, value in enumerate(values, 1):
        form = _form(value, literals)
        if form not in known:
            known.add(form)
            yield from faults(value, kind, f"{path.name}:{number}")


def _form(value: Any, literals: frozenset[Any]) -> Hashable:
    """All of a value that decides whether it conforms: keys, types, and which of the literals it has where."""
    if isinstance(value, dict):
        return tuple((key, _form(one, literals)) for key, one in value.items())
    if isinstance(value, list):
        return tuple(dict.fromkeys(_form(one, literals) for one in value))
    return value if isinstance(value, (str, int)) and value in literals else type(value)


def _literals(kind: Any) -> Iterator[Any]:
    """Every value that a type names, at any depth."""
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    for inner in _hints(kind).values() if is_typeddict(kind) else get_args(kind):
        yield from _literals(inner)


def run_faults(run: Path) -> list[str]:
    """The faults of all files of a run."""
    return [
        fault
        for pattern, kind in RUN_FILES.items()
        for path in [*run.glob(pattern), *run.glob(f"{pattern}.gz")]
        for fault in file_faults(path, kind)
    ]
