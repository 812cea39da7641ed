"""Figures that are computed on their own, so that one that fails loses neither a training nor the others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from preskip.errors import DivergedError, PreskipError
from preskip.train.distributed import world_size

T = TypeVar("T")


@contextmanager
def measured(notes: list[str] | None, what: str) -> Iterator[None]:
    """Measure something beside what is trained: where it fails, that is noted and the rest is kept.

    Running out of memory and a full disk end the attempt as always: resuming may mend them.

    Args:
        notes: where; None raises the error.
        what: the figure.
    """
    try:
        yield
    except (torch.OutOfMemoryError, OSError):
        raise
    except Exception as error:
        if notes is None:
            raise
        notes.append(f"no {what}: {_in_short(error)}")


@contextmanager
def controlled(notes: list[str], what: str) -> Iterator[None]:
    """Train a control after all cells are done: where it fails, even for want of memory, that is noted.

    With other processes only a loss that is not finite is: they wait for the main process after any other error.
    """
    try:
        yield
    except Exception as error:
        if world_size() > 1 and not isinstance(error, DivergedError):
            raise
        notes.append(f"no {what}: {_in_short(error)}")


def finite(value: T) -> T:
    """The value itself, if JSON can hold it.

    Raises:
        PreskipError: a number in it is NaN or infinite.
    """
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise PreskipError("it holds NaN or infinity: try --dtype float32") from None
    return value


def _in_short(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
