"""Figures that are computed on their own, so that one that fails loses neither a training nor the others."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from typing import TypeVar

from preskip.errors import DivergedError, PreskipError, is_out_of_memory, noted
from preskip.train.distributed import world_size

T = TypeVar("T")


def measured(notes: list[str] | None, what: str) -> AbstractContextManager[None]:
    """Measure something beside what is trained: where it fails, that is noted and the rest is kept.

    Running out of memory and a full disk end the attempt as always: resuming may mend them.

    Args:
        notes: where; None raises the error.
        what: the figure.
    """
    return noted(notes, what, catches=Exception, passes=_may_be_mended)


def _may_be_mended(error: Exception) -> bool:
    return isinstance(error, OSError) or is_out_of_memory(error)


def controlled(notes: list[str], what: str) -> AbstractContextManager[None]:
    """Train a control after all cells are done: where it fails, even for want of memory, that is noted.

    With other processes only a loss that is not finite is: they wait for the main process after any other error.
    """
    return noted(notes, what, catches=DivergedError if world_size() > 1 else Exception)


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
