"""Words where a text has them: what stands between white space; else characters, as in Chinese, Japanese and Thai."""

from __future__ import annotations

import re
import unicodedata
from itertools import islice

# Thai, Lao, Tibetan, Myanmar, Khmer, Tai Tham, radicals, kana, Bopomofo, Han; Korean has spaces.
_SPACELESS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\u1a20-\u1aaf\u2e80-\u2fdf\u3005-\u3007\u3040-\u312f"
    "\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
# A name or a quotation in such a script leaves a text its words.
_MOST_SPACELESS = 0.2
# No language has words of so many characters on average; shorter texts may be one long word.
_LONGEST_MEAN = 50
_WORD = re.compile(r"\S+")
_JOINER = "\u200d"


def has_words(text: str) -> bool:
    """Whether white space stands between the words of a text."""
    words = text.split()
    characters = sum(map(len, words))
    if characters > _LONGEST_MEAN * max(1, len(words)):
        return False
    return len(_SPACELESS.findall(text)) <= _MOST_SPACELESS * characters


def count_words(text: str) -> int:
    """Words of a text; 0 where white space does not stand between them."""
    return len(text.split()) if has_words(text) else 0


def beginning(text: str, words: int) -> str:
    """The first words of a text, white space kept; of one without words so many characters, their marks included."""
    if has_words(text):
        last = next(islice(_WORD.finditer(text), words - 1, None), None)
        return text if last is None else text[: last.end()]
    end = seen = 0
    for end, character in enumerate(text):
        joins = unicodedata.category(character).startswith("M") or _JOINER in (character, text[end - 1 : end])
        seen += not character.isspace() and not joins
        if seen > words:
            return text[:end].rstrip()
    return text
