"""What options of the command line hold: lists, whole numbers, extents, values by arm; for every command alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from preskip.errors import PreskipError

T = TypeVar("T")


def parse_names(text: str | Sequence[Any]) -> tuple[str, ...]:
    """Read a list separated by commas; a sequence (of a preset) is taken part by part."""
    parts = text.split(",") if isinstance(text, str) else map(str, text)
    return tuple(part.strip() for part in parts if part.strip())


def parse_seeds(text: str | Sequence[Any]) -> tuple[int, ...]:
    """Read `--seeds`: `1,2,3`.

    Raises:
        PreskipError: a part is not a whole number.
    """
    seeds = []
    for part in parse_names(text):
        try:
            seeds.append(int(part))
        except ValueError:
            raise PreskipError(f"--seeds: {part!r} is not a whole number") from None
    return tuple(seeds)


def parse_extent(text: str, documents: int, words: int) -> tuple[str, int, int]:
    """Read one of `--eval-corpora`: `books` or `books:40x400` gives name, documents, and words of each.

    Args:
        text: as given.
        documents: how many, where the text does not say.
        words: how many of each, where the text does not say.

    Raises:
        PreskipError: fewer than 2 documents, or none of their words.
    """
    found = re.fullmatch(r"(.+):(\d+)x(\d+)", text)
    name, count, length = (found[1], int(found[2]), int(found[3])) if found else (text, documents, words)
    if count < 2 or length < 1:
        raise PreskipError(f"--eval-corpora {text!r} is too small: give 2 documents or more, of 1 word or more")
    return name, count, length


def parse_by_arm(
    texts: Sequence[str], read: Callable[[str], T], flag: str, example: str
) -> tuple[T | None, dict[str, T]]:
    """Read an option that is given for every arm (`1e-3`) or for one (`lora=1e-3`), repeatedly.

    Args:
        texts: as given.
        read: makes the value of a text.
        flag: of the option, for the message.
        example: of its values, for the message.

    Returns:
        The last value for every arm, or None, and those by arm.

    Raises:
        PreskipError: `read` refuses a value.
    """
    everyone: T | None = None
    by_arm: dict[str, T] = {}
    for text in texts:
        arm, _, number = text.rpartition("=")
        try:
            value = read(number)
        except ValueError:
            raise PreskipError(f"{flag} {text!r} is not a number or arm=number, e.g. {flag} {example}") from None
        if arm:
            by_arm[arm] = value
        else:
            everyone = value
    return everyone, by_arm
