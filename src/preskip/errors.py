"""The one exception type that the command line shows as a single line instead of a traceback."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PreskipError(ValueError):
    """A user's mistake or an outside condition, told in one line that names the value and the mend."""


class AfterOutputError(PreskipError):
    """A failure after a command has printed its result: it is said on stderr alone, also with `--json`."""


class DivergedError(PreskipError):
    """A loss, gradient or likelihood that is not finite: a search for a learning rate counts it as a bad rate."""


def one_line(error: object, most: int | None = None) -> str:
    """An error's message on one line, cut to `most` characters."""
    return " ".join(str(error).split())[:most]


@contextmanager
def noted(
    notes: list[str] | None,
    what: str,
    *,
    catches: type[Exception] = PreskipError,
    passes: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Compute one figure on its own: where it fails, that is noted, and the others are kept.

    Args:
        notes: where; None raises the error.
        what: the figure.
        catches: errors that are noted.
        passes: of these, those that are raised all the same.
    """
    try:
        yield
    except passes:
        raise
    except catches as error:
        if notes is None:
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
