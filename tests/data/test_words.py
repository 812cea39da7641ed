"""Words and characters: held against a count by Unicode's own names of scripts, and cuts that lose nothing."""

import unicodedata

import pytest

from preskip.data.words import beginning, count_words, has_words

SPACED = ["The river, in winter.", "Die Donaudampfschifffahrt fährt.", "река течёт", "강은 흐른다 오늘", "हिन्दी में लिखा"]
SPACED += ["The game 戦場のヴァルキュリア (Valkyria) was released in Japan and is set in the year of the second war."]
UNSPACED = ["第一條河流載著小船。", "川は小さな舟を運ぶ。", "แม่น้ำพาเรือ ลำเล็กผ่าน", "ទន្លេដឹកទូក", "མདོ་ཁམས་", "aGVsbG8" * 40]


@pytest.mark.parametrize("text", SPACED)
def test_words_are_counted_where_there_are_words(text):
    assert has_words(text)
    assert count_words(text) == len(text.split())
    assert beginning(text, 2).split() == text.split()[:2]
    assert beginning(text + " \n", 10**12) == text + " \n"


@pytest.mark.parametrize("text", UNSPACED)
def test_other_texts_are_cut_by_characters(text):
    assert not has_words(text)
    assert count_words(text) == 0
    cut = beginning(text, 4)
    assert text.startswith(cut)
    letters = [char for char in cut if not char.isspace() and not unicodedata.category(char).startswith("M")]
    assert len(letters) == 4
    following = text[len(cut) : len(cut) + 1]
    assert not following or not unicodedata.category(following).startswith("M")  # no vowel is torn off
    assert beginning(text, len(text)) == text


def test_an_emoji_of_several_parts_is_one_character():
    family = "👩\u200d👩\u200d👧"
    assert beginning(f"山{family}川" * 9, 2) == f"山{family}"


@pytest.mark.parametrize("words", [1, 3, 7, 100])
def test_the_same_beginning_as_a_regular_expression_gives(words):
    import re

    text = "  One two.\n\n Three\tfour five  six seven \n"
    assert beginning(text, words) == re.match(rf"(?:\s*\S*){{{words}}}", text)[0]
