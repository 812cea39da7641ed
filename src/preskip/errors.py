"""The one exception type that the command line shows as a single line instead of a traceback."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


class PreskipError(ValueError):
    """A user's mistake or an outside condition, told in one line that names the value and the mend."""


class AfterOutputError(PreskipError):
    """A failure after a command has printed its result: it is said on stderr alone, also with `--json`."""


class DivergedError(PreskipError):
    """A loss, gradient or likelihood that is not finite: a search for a learning rate counts it as a bad rate."""


class LostWorkersError(PreskipError):
    """Processes that compute were lost or could not be had: a resume may have others, so what is prepared is kept."""


def some(names: Sequence[str], most: int = 4) -> str:
    """The first `most` of some names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def one_line(error: object, most: int | None = None) -> str:
    """An error's message on one line, cut to `most` characters."""
    return " ".join(str(error).split())[:most]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice: torch has a type for it on a device, and words in a RuntimeError on a CPU.

    The type is recognised by its name, since what must start quickly imports this module and not torch.
    """
    return (
        isinstance(error, MemoryError)
        or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


@contextmanager
def noted(
    notes: list[str] | None,
    what: str,
    *,
    catches: type[Exception] = PreskipError,
    passes: Callable[[Exception], bool] = lambda error: False,
) -> Iterator[None]:
    """Compute one figure on its own: where it fails, that is noted, and the others are kept.

    Args:
        notes: where; None raises the error.
        what: the figure.
        catches: errors that are noted.
        passes: whether one of them is raised all the same. Default: none is.
    """
    try:
        yield
    except catches as error:
        if notes is None or passes(error):
            raise
        notes.append(f"no {what}: {one_line(error) or type(error).__name__}")


@contextmanager
def explained(explain: Callable[[Exception], str]) -> Iterator[None]:
    """Turn whatever a library raises (many kinds, from several) into one line; our own errors pass.

    Args:
        explain: the line for an error.

    Raises:
        PreskipError: in place of the error.
    """
    try:
        yield
    except PreskipError:
        raise
    except Exception as error:
        raise PreskipError(explain(error)) from error
