"""What kind of token a token is: frequency, place in its word, new or repeated, letters or marks, case, function word.

Everything is read off the text: a word is a run of letters and digits, with apostrophes inside it. The list of function
words is English; in other languages the dimension `word` means nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from preskip.analysis.explain.words import FUNCTION_WORDS
from preskip.data.blocks import text_ids

# Classes of each dimension, in the order in which they are shown.
CLASSES: dict[str, tuple[str, ...]] = {
    "frequency": ("1 in 100 or more", "1 in 1,000 or more", "1 in 10,000 or more", "rarer"),
    "position": ("whole word", "word start", "word continuation"),
    "repeat": ("first occurrence", "repeated"),
    "kind": ("letters", "digits", "punctuation", "white space"),
    "case": ("lower case", "capitalised", "all capitals"),
    "word": ("function word", "content word"),
}
# A token whose share of the reference text reaches the limit is in the class of the same place.
_LIMITS = (1e-2, 1e-3, 1e-4)
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """The tokens of a text, a column each; None where a dimension does not apply.

    Attributes:
        strings: what each token adds to the text; joined, they are the text.
        frequency: share of the token in the reference text, 0 to 1.
        position_in_word: number of tokens of the same word before it.
        repeated: whether the same token stands earlier in its window.
        labels: by dimension of `CLASSES`, the class of each token.
    """

    strings: list[str]
    frequency: list[float]
    position_in_word: list[int | None]
    repeated: list[bool]
    labels: dict[str, list[str | None]]


class Frequencies:
    """How often each token occurs in a reference text.

    Args:
        texts: the reference; read once, no more than `most_characters` of it.
        tokenizer: a Hugging Face tokenizer.
        most_characters: where to stop.
    """

    def __init__(self, texts: Iterable[str], tokenizer: Any, most_characters: int = 4_000_000) -> None:
        self._counts: Counter[int] = Counter()
        characters = 0
        for text in texts:
            part = text[: most_characters - characters]
            self._counts.update(text_ids(part, tokenizer))
            characters += len(part)
            if characters >= most_characters:
                break
        self.tokens = sum(self._counts.values())

    def share(self, token: int) -> float:
        """Occurrences of a token over all tokens, 0 for one that does not occur."""
        return self._counts[token] / self.tokens if self.tokens else 0.0


def encode(text: str, tokenizer: Any) -> tuple[str, list[int], list[tuple[int, int]]]:
    """Tokenise without special tokens.

    Returns:
        The text, token ids, and where each token lies in the text. A tokenizer that cannot tell (a slow one) gives the
        text as it decodes it.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return text, list(encoded["input_ids"]), [tuple(pair) for pair in encoded["offset_mapping"]]
    ids = text_ids(text, tokenizer)
    pieces = [tokenizer.decode([token]) for token in ids]
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    return "".join(pieces), ids, list(pairwise(ends))


def classify(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], frequencies: Frequencies, windows: Sequence[int]
) -> TokenTable:
    """Describe the tokens of a text, each at [begin, end) of it and read in a window of that number.

    A token is repeated only within its window.
    """
    words = [match.span() for match in _WORD.finditer(text)]
    owners = _owners(text, offsets, words)
    pieces = Counter(owner for owner in owners if owner is not None)
    met: Counter[int] = Counter()
    strings, frequency, repeated = [], [], []
    places: list[int | None] = []
    labels: dict[str, list[str | None]] = {dimension: [] for dimension in CLASSES}
    seen: set[tuple[int, int]] = set()
    end = 0
    for token, (begin, stop), owner, window in zip(ids, offsets, owners, windows, strict=True):
        strings.append(text[end : max(end, stop)])
        end = max(end, stop)
        frequency.append(frequencies.share(token))
        repeated.append((window, token) in seen)
        seen.add((window, token))
        word = place = position = None
        if owner is not None:
            word, place = text[slice(*words[owner])], met[owner]
            position = CLASSES["position"][0 if pieces[owner] == 1 else 2 if place else 1]
            met[owner] += 1
        places.append(place)
        labels["frequency"].append(_band(frequency[-1]))
        labels["position"].append(position)
        labels["repeat"].append(CLASSES["repeat"][repeated[-1]])
        labels["kind"].append(_kind(text[begin:stop]))
        labels["case"].append(_case(word))
        labels["word"].append(_function_or_content(word))
    if strings:
        strings[-1] += text[end:]  # what a normaliser has dropped behind the last token
    return TokenTable(strings=strings, frequency=frequency, position_in_word=places, repeated=repeated, labels=labels)


def _owners(text: str, offsets: Sequence[tuple[int, int]], words: Sequence[tuple[int, int]]) -> list[int | None]:
    """For each token the index of the first word of which it holds a character."""
    owners: list[int | None] = []
    first = 0
    for begin, stop in offsets:
        while first < len(words) and words[first][1] <= begin:
            first += 1
        owners.append(first if first < len(words) and words[first][0] < stop else None)
    return owners


def _band(share: float) -> str:
    return next((name for name, limit in zip(CLASSES["frequency"], _LIMITS, strict=False) if share >= limit), "rarer")


def _kind(piece: str) -> str:
    letters, digits, punctuation, space = CLASSES["kind"]
    if any(character.isalpha() for character in piece):
        return letters
    if any(character.isdigit() for character in piece):
        return digits
    return punctuation if piece.strip() else space


def _case(word: str | None) -> str | None:
    """Case of a word; None without letters that have one."""
    cased = [character for character in word or "" if character.isupper() or character.islower()]
    if not cased:
        return None
    lower, capitalised, capitals = CLASSES["case"]
    if len(cased) > 1 and all(character.isupper() for character in cased):
        return capitals
    return capitalised if cased[0].isupper() else lower


def _function_or_content(word: str | None) -> str | None:
    if word is None or not any(character.isalpha() for character in word):
        return None
    stem = re.split("['’]", word.lower())[0]
    return CLASSES["word"][0 if stem in FUNCTION_WORDS else 1]
