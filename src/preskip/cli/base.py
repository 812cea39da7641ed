"""The base that stored weights go on, for the commands that load it."""

from __future__ import annotations

from pathlib import Path

from preskip.data.splits import locate
from preskip.errors import PreskipError
from preskip.runs.weights import Source


def base_of(source: Source, model: str | None) -> tuple[str, str | None]:
    """Name and commit of the base: as given, at its newest commit, or as the weights and their run have it.

    Args:
        source: of `find_source`.
        model: value of `--model`.

    Raises:
        PreskipError: it is not recorded, or its folder is gone.
    """
    if model is not None:
        return model, None
    if not source.base:
        raise PreskipError(f"{source.weights} does not say which base it was trained on: give it with --model")
    name = locate(source.base, source.directory)
    if Path(name).is_absolute() and not Path(name).exists():
        raise PreskipError(f"the base of {source.weights}, {name}, is not there any more: give it with --model")
    return name, source.revision
