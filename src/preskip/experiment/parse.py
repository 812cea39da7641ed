"""What options hold, as text of the command line or as values of a file: lists, numbers, layers, values by arm."""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from preskip.branch_settings import ATTENTION_LAYERS
from preskip.errors import PreskipError


def parse_names(text: Any, among: Collection[str] = ()) -> tuple[str, ...]:
    """Read a list separated by commas; a list (of a file) is taken part by part, any other value as one part.

    Args:
        text: as given.
        among: names whose own commas do not separate.
    """
    parts = _split(text, among.__contains__) if isinstance(text, str) else map(str, listed(text))
    return tuple(part.strip() for part in parts if part.strip())


def parse_corpora(text: str | Sequence[Any]) -> tuple[str, ...]:
    """Read a list of corpora separated by commas; a comma in the path of what exists does not separate."""
    if not isinstance(text, str):
        return parse_names(text)
    return parse_names(_split(text, lambda name: os.path.exists(re.sub(r":\d+x\d+$", "", name))))


def _split(text: str, is_whole: Callable[[str], bool]) -> list[str]:
    """The parts between commas; several that together are a whole name are one."""
    parts, found = text.split(","), []
    while parts:
        joined = (",".join(parts[:count]).strip() for count in range(len(parts), 1, -1))
        whole = next((name for name in joined if is_whole(name)), parts[0].strip())
        parts = parts[whole.count(",") + 1 :]
        found.append(whole)
    return found


def parse_seeds(text: str | int | Sequence[Any], flag: str = "--seeds") -> tuple[int, ...]:
    """Read `--seeds`: `1,2,3`, or `1,...,8` for all from 1 to 8.

    Raises:
        PreskipError: a part is not a whole number.
    """
    seeds: list[int] = []
    fill = False
    for part in parse_names(text):
        if part == "..." and seeds and not fill:
            fill = True
            continue
        try:
            last = int(part)
        except ValueError:
            raise PreskipError(f"{flag}: {part!r} is not a whole number") from None
        if fill and not seeds[-1] < last < seeds[-1] + 1000:
            raise PreskipError(f"{flag}: {seeds[-1]},...,{last} is no rising list")
        seeds += range(seeds[-1] + 1, last + 1) if fill else [last]
        fill = False
    if fill:
        raise PreskipError(f"{flag}: ... needs a last number, e.g. 1,...,8")
    return tuple(seeds)


def parse_looks(text: str | int | Sequence[Any]) -> tuple[int, ...]:
    """Read `--looks`: numbers of seeds, `3,5,8`.

    Raises:
        PreskipError: a part is not a whole number.
    """
    return parse_seeds(text, "--looks")


def parse_primary(text: str | Sequence[str]) -> tuple[str, ...]:
    """Read `--primary`: `content:lora`, or `content:lora:books` on one evaluation set.

    Raises:
        PreskipError: neither two nor three names.
    """
    parts = tuple(part.strip() for part in text.split(":", 2)) if isinstance(text, str) else parse_names(text)
    if len(parts) not in (0, 2, 3) or not all(parts):
        raise PreskipError(f"--primary {text!r} is not ARM:REFERENCE or ARM:REFERENCE:SET, e.g. preskip:lora")
    return parts


def check_primary(primary: Sequence[str], sets: Sequence[str]) -> None:
    """Refuse a primary comparison on a set that is none of those scored.

    Raises:
        PreskipError: with their names.
    """
    if len(primary) > 2 and primary[2] not in sets:
        raise PreskipError(f"--primary: {primary[2]!r} is not compared: choose one of {', '.join(sets)}")


def parse_layers(text: str | int | Sequence[int | str] | None) -> tuple[int | str, ...] | None:
    """Read `--layers`: `0-5,10` gives 0, 1, 2, 3, 4, 5, 10; `attention` stays, all that have it; None gives None.

    Raises:
        PreskipError: not a list of numbers and ranges.
    """
    if text is None:
        return None
    if text == ATTENTION_LAYERS or tuple(listed(text)) == (ATTENTION_LAYERS,):
        return (ATTENTION_LAYERS,)
    layers: list[int | str] = []
    for part in text.split(",") if isinstance(text, str) else map(str, listed(text)):
        first, dash, last = part.strip().partition("-")
        try:
            numbers = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise PreskipError(f"--layers {text!r} is not a list of layers, e.g. 0-5,10, nor 'attention'") from None
        if not numbers:
            raise PreskipError(f"--layers {part.strip()!r} ends before it begins: give {last}-{first}")
        layers += numbers
    return tuple(layers)


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
    given: Any, flag: str = "--lr", example: str = "3e-4 or --lr lora=1e-3"
) -> tuple[float | None, dict[str, float]]:
    """Read a repeatable option of numbers, for every arm (`1e-3`) or for one (`lora=1e-3`).

    Args:
        given: texts, a number, or numbers by arm.
        flag: of the option, for the message.
        example: of its values, for the message.

    Returns:
        The value for every arm, or None, and those by arm.

    Raises:
        PreskipError: not a number, or two for one.
    """
    values: dict[str, float] = {}
    for text in map(str, by_arm_texts(given)):
        arm, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise PreskipError(f"{flag} {text!r} is not a number or arm=number, e.g. {flag} {example}") from None
        if arm in values:
            raise PreskipError(f"{flag} is given twice for {arm or 'every arm'}: leave one of them out")
        values[arm] = value
    everyone = values.pop("", None)
    return everyone, values


def by_arm_texts(given: Any) -> Sequence[Any]:
    """The values of a repeatable option of numbers; a mapping, as a file may give it, as arm=number."""
    return [f"{arm}={value}" for arm, value in given.items()] if isinstance(given, Mapping) else listed(given)


def parse_tokens(text: str | int) -> int:
    """Read `--tokens`: `5000000`, `5e6`, `5M` or `1.5B`.

    Raises:
        PreskipError: not a number of tokens.
    """
    units = {"k": 1e3, "m": 1e6, "b": 1e9}
    text = str(text)
    digits, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1.0)
    try:
        return int(float(digits) * unit)
    except (ValueError, OverflowError):
        raise PreskipError(f"--tokens {text!r} is not a number of tokens, e.g. 5M or 5000000") from None


def parse_overrides(given: Mapping[str, Any] | str | Sequence[str]) -> dict[str, Any]:
    """Read `--set` options, fields of the architecture's config: `rope_theta=10000` or `tie_word_embeddings=true`.

    Raises:
        PreskipError: not of this form.
    """
    if isinstance(given, Mapping):
        return dict(given)
    values = {}
    for text in map(str, listed(given)):
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise PreskipError(f"--set {text!r} is not FIELD=VALUE, e.g. --set tie_word_embeddings=true")
        try:
            values[name.strip()] = json.loads(value)
        except ValueError:
            values[name.strip()] = value
    return values


def parse_number(text: Any, kind: Callable[[Any], Any]) -> Any:
    """A number of a text, or of a file, where it is one; anything else is left to the check of its field."""
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        return text
    try:
        value = kind(text)
    except (ValueError, OverflowError):
        return text
    return value if isinstance(text, str) or value == text else text


def listed(given: Any) -> Sequence[Any]:
    """A repeatable option as a list, also where a file gives a single value."""
    return given if isinstance(given, (list, tuple)) else [given]
