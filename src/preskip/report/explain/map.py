"""The bypass map's data, packed small: the tokens of the shown texts, and one number per token and layer."""

from __future__ import annotations

import base64
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MEASURES = ("bypass", "enrichment")
DIGITS = 4  # as stored in explain.json
NONE = -128  # the exponent of a value that was not measured
SENTENCE_END = re.compile(r"[.!?…]['\"”’)\]]*\s*$")
LONGEST_SENTENCE = 120  # tokens; longer ones are cut, so that each fits a heat map with words


def pack_map(documents: Sequence[Mapping[str, Any]], layers: Sequence[int]) -> dict[str, Any]:
    """What the page's map reads of explain.json's documents: per measure a row for each of the layers, or None.

    Returns:
        layers, documents (id, title, tokens, sentences: each one's first token), and measures: for each one that any
        document has, the text of `pack` over documents, layers and tokens in this order.
    """
    return {
        "layers": list(layers),
        "documents": [
            {key: document[key] for key in ("id", "title", "tokens")}
            | {"sentences": sentence_starts(document["tokens"])}
            for document in documents
        ],
        "measures": {
            measure: pack(list(_values(documents, measure, len(layers))))
            for measure in MEASURES
            if any(document.get(measure) is not None for document in documents)
        },
    }


def pack(values: Sequence[float | None]) -> str:
    """Numbers of up to 4 significant digits, exactly, in about 2.4 characters each.

    Args:
        values: finite and not negative, or None.

    Returns:
        base64 of zlib of three planes of one byte per value: low and high byte of the mantissa (0 … 9999), and the
        decimal exponent (signed; -128 for None). A value is mantissa · 10^exponent.
    """
    parts = [(0, NONE) if value is None else decimal(value) for value in values]
    low, high = bytes(mantissa & 255 for mantissa, _ in parts), bytes(mantissa >> 8 for mantissa, _ in parts)
    exponents = bytes(exponent & 255 for _, exponent in parts)
    return base64.b64encode(zlib.compress(low + high + exponents, 9)).decode("ascii")


def decimal(value: float) -> tuple[int, int]:
    """Mantissa (an integer of 4 digits, or 0) and decimal exponent of a value, rounded to 4 significant digits.

    Raises:
        ValueError: the value is negative or not finite.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{value} on the bypass map")
    if value < 1e-100:
        return 0, 0
    digits, exponent = f"{value:.{DIGITS - 1}e}".split("e")
    return int(digits.replace(".", "")), int(exponent) - (DIGITS - 1)


def sentence_starts(tokens: Sequence[str]) -> list[int]:
    """The index of each sentence's first token: behind a full stop and a space, or a line break, or 120 tokens."""
    starts, text = [0] if tokens else [], ""
    for index, token in enumerate(tokens):
        ended = "\n" in text or (bool(SENTENCE_END.search(text)) and token[:1].isspace())
        blank = not token.strip()
        if index and not blank and (ended or index - starts[-1] >= LONGEST_SENTENCE):
            starts.append(index)
            text = ""
        text += token
    return starts


def _values(documents: Sequence[Mapping[str, Any]], measure: str, layers: int) -> Iterator[float | None]:
    for document in documents:
        rows = document.get(measure) or [None] * layers
        count = len(document["tokens"])
        if len(rows) != layers or any(row is not None and len(row) != count for row in rows):
            raise ValueError(f"{measure} of document {document['id']!r} does not fit its layers and tokens")
        for row in rows:
            yield from row if row is not None else [None] * count
