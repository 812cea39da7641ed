"""Every odd corpus is read as what it is or refused in one line: nothing raises, nothing changes without a word."""

from contextlib import nullcontext, suppress

import pytest

from odd_inputs import Odd, every
from preskip.data.corpus import load_corpus
from preskip.errors import PreskipError

ALL = list(every())


def test_there_are_enough():
    assert len(ALL) >= 300


@pytest.mark.parametrize("odd", ALL, ids=[odd.name for odd in ALL])
def test_read_as_it_is_or_refused_in_one_line(odd: Odd, tmp_path):
    path = odd.make(tmp_path)
    options = dict(zip(odd.options[::2], odd.options[1::2], strict=False))
    column, split = options.get("--text-column"), options.get("--corpus-split")
    asked = {"text_column": column, "split": split, "progress": False}
    if odd.texts is None and odd.options != ("accident",):
        with pytest.raises(PreskipError) as refused:
            load_corpus(str(path), **asked)
        assert 0 < len(str(refused.value)) < 800
        return
    with suppress(PreskipError) if odd.texts is None else nullcontext():  # an accident may have broken it
        found = [document.text for document in load_corpus(str(path), **asked).documents]
        assert odd.texts is None or sorted(found) == sorted(odd.texts)
