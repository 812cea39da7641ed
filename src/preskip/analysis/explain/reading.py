"""Texts as what the model reads: tokens with their classes, cut into windows, one text at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from preskip.analysis.explain.classes import Frequencies, TokenTable, classify, encode
from preskip.analysis.explain.forward import Chunk
from preskip.data.blocks import opening_token, start_token
from preskip.errors import PreskipError

SETS = ("held-out", "given")


@dataclass(frozen=True)
class Text:
    """One text to read.

    Attributes:
        id: unique among the texts.
        title: for people.
        text: the text itself.
        set: "held-out" or "given" by the user.
        group: texts of one group, as those of one book, are one cluster. Default: the id.
    """

    id: str
    title: str
    text: str
    set: str = "held-out"
    group: str = ""

    def __post_init__(self) -> None:
        """Fill in the default."""
        object.__setattr__(self, "group", self.group or self.id)


@dataclass(frozen=True)
class Reading:
    """A text and its tokens.

    Attributes:
        index: place among the texts.
        text: the text.
        ids: its tokens, without the start token.
        table: what kind of token each is.
    """

    index: int
    text: Text
    ids: list[int]
    table: TokenTable


def chunks(
    texts: Iterable[Text], tokenizer: Any, frequencies: Frequencies, *, context_length: int, counted: str
) -> Iterator[Chunk]:
    """Cut texts into windows that follow each other, each read on its own; texts are taken one at a time.

    The tokenizer's start token goes before each text, and before later windows of it, too, where the tokenizer itself
    opens every text with it. Tokens of the set `counted` count for statistics.

    Raises:
        PreskipError: a text of fewer than 2 tokens.
    """
    first, later = ([] if token is None else [token] for token in (start_token(tokenizer), opening_token(tokenizer)))
    for index, text in enumerate(texts):
        shown, ids, offsets = encode(text.text, tokenizer)
        if len(ids) < 2:
            raise PreskipError(f"text {text.title!r} has {len(ids)} token: 2 or more are needed")
        begins = [0, *range(context_length - len(first), len(ids), context_length - len(later))]
        windows = [bisect_right(begins, place) - 1 for place in range(len(ids))]
        reading = Reading(index, text, ids, classify(shown, ids, offsets, frequencies, windows))
        for begin, end in pairwise([*begins, len(ids)]):
            lead = later if begin else first
            targets = [*lead, *ids[begin : end + 1]][1:]
            yield Chunk(reading, begin, [*lead, *ids[begin:end]], targets, text.set == counted, len(lead))
