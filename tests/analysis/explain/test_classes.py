"""Classes of tokens on a text that shows every one."""

import pytest

from preskip.analysis.explain.classes import CLASSES, Frequencies, classify, encode
from tiny_text import PROSE, tiny_tokenizer

TEXT = "The harbor's NATO ship, and the 1945 ship IPv é…\n"


def table(text=TEXT, windows=None, frequencies=None, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer()
    shown, ids, offsets = encode(text, tokenizer)
    windows = [0] * len(ids) if windows is None else windows
    return classify(shown, ids, offsets, frequencies or Frequencies([PROSE], tokenizer), windows), ids


def of_word(found, word):
    """Labels of the tokens whose text lies in a word of TEXT."""
    begin = TEXT.index(word)
    places, end = [], 0
    for index, string in enumerate(found.strings):
        start, end = end, end + len(string)
        if begin < end and start < begin + len(word) and string.strip():
            places.append(index)
    return places


def test_every_class_where_it_belongs():
    found, _ = table()
    assert "".join(found.strings) == TEXT
    expected = {
        "The": ("letters", "capitalised", "function word"),
        "harbor's": (None, "lower case", "content word"),
        "NATO": ("letters", "all capitals", "content word"),
        ",": ("punctuation", None, None),
        "and": ("letters", "lower case", "function word"),
        "1945": ("digits", None, None),
        "IPv": ("letters", "capitalised", "content word"),
        "é": ("letters", "lower case", "content word"),
        "…": ("punctuation", None, None),
    }
    for word, (kind, case, function) in expected.items():
        places = of_word(found, word)
        assert places, word
        for place in places:
            assert kind in (None, found.labels["kind"][place]), word
            assert found.labels["case"][place] == case, word
            assert found.labels["word"][place] == function, word
    places = of_word(found, "harbor's")
    assert [found.position_in_word[place] for place in places] == list(range(len(places)))
    assert [found.labels["position"][p] for p in places] == ["word start"] + ["word continuation"] * (len(places) - 1)
    (the,) = of_word(found, "The")[:1]
    assert len(of_word(found, "The")) > 1 or found.labels["position"][the] == "whole word"
    assert found.labels["kind"][-1] == "white space"
    for dimension, column in found.labels.items():
        assert set(column) <= {*CLASSES[dimension], None}


def test_repeated_means_earlier_in_the_same_window():
    found, ids = table()
    second = next(i for i, token in enumerate(ids) if token in ids[:i])
    first = ids.index(ids[second])
    assert (found.repeated[first], found.repeated[second]) == (False, True)
    assert found.repeated == [ids[i] in ids[:i] for i in range(len(ids))]
    split, _ = table(windows=[int(i > first) for i in range(len(ids))])
    assert not split.repeated[second]


def test_frequency_is_the_share_of_the_reference():
    tokenizer = tiny_tokenizer()
    reference = tokenizer(PROSE, add_special_tokens=False)["input_ids"] * 2
    found, ids = table(frequencies=Frequencies([PROSE, PROSE], tokenizer))
    assert found.frequency == pytest.approx([reference.count(token) / len(reference) for token in ids])
    assert {found.labels["frequency"][i] for i in range(len(ids)) if found.frequency[i] == 0} == {"rarer"}
    assert {found.labels["frequency"][i] for i in range(len(ids)) if found.frequency[i] >= 0.01} == {"1 in 100 or more"}
    assert Frequencies([PROSE] * 9, tokenizer, most_characters=100).tokens < 100


def test_characters_in_pieces_and_slow_tokenizers():
    tokenizer = tiny_tokenizer()
    text = "naïve 🦊 ship"
    found, ids = table(text, tokenizer=tokenizer)
    assert "".join(found.strings) == text
    assert len(ids) > len(text.split())

    class Slow:
        is_fast = False

        def __call__(self, text, **options):
            return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

        def decode(self, ids):
            return tokenizer.decode(ids)

    shown, slow_ids, offsets = encode("The ship", Slow())
    assert (shown, slow_ids) == ("The ship", encode("The ship", tokenizer)[1])
    assert offsets == encode("The ship", tokenizer)[2]
