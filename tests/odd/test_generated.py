"""Corpora that Hypothesis makes: any texts in any form are read as they are, any damage is read or refused."""

import tempfile
from pathlib import Path

import pytest

from odd_inputs import FORMS, PROSE, read, write
from preskip.data.corpus import load_corpus
from preskip.errors import PreskipError

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = hypothesis.strategies

# No lone surrogates, which UTF-8 cannot hold, and no zero bytes, which are refused.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
ROWS = st.lists(st.none() | TEXT, max_size=6)
FORM = st.sampled_from(FORMS)
EDIT = st.tuples(
    st.sampled_from(["cut", "change", "lose", "double"]), st.floats(0, 1), st.binary(min_size=1, max_size=6)
)


def given(examples, *strategies):
    """The same examples in every run, whatever the time that each takes."""

    def decorate(test):
        settings = hypothesis.settings(max_examples=examples, derandomize=True, deadline=None, database=None)
        return settings(hypothesis.given(*strategies)(test))

    return decorate


def read_or_refused(path):
    """What may be damaged has texts, or is refused with its name."""
    try:
        found = loaded(path)
    except PreskipError as error:
        refusal = str(error)
    else:
        assert found
        assert all(text.strip() for _, text in found)
        return
    assert 0 < len(refusal) < 800
    assert str(path).splitlines()[0] in refusal


def loaded(path):
    return [(document.id, document.text) for document in load_corpus(str(path), progress=False).documents]


@given(50, FORM, ROWS)
def test_any_texts_in_any_form_are_read_as_they_are(form, rows):
    content = [PROSE[0], *rows]
    with tempfile.TemporaryDirectory() as folder:
        found = loaded(write(Path(folder) / f"a.{form}", content))
    assert [text for _, text in found] == read(content)
    assert [id for id, _ in found] == [f"a#{n}" for n, text in enumerate(content, 1) if text and text.strip()]


@given(8, ROWS)
def test_any_texts_are_the_same_in_all_forms(rows):
    with tempfile.TemporaryDirectory() as folder:
        first, *others = (loaded(write(Path(folder) / form / f"a.{form}", [PROSE[0], *rows])) for form in FORMS)
    assert all(other == first for other in others)


@given(60, FORM, st.lists(EDIT, min_size=1, max_size=3))
def test_any_damage_is_read_or_refused_in_one_line(form, edits):
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / f"a.{form}", PROSE)
        raw = bytearray(path.read_bytes())
        for kind, where, more in edits:
            at = int(where * len(raw))
            match kind:
                case "cut":
                    del raw[at:]
                case "change":
                    raw[at : at + len(more)] = more
                case "lose":
                    del raw[at : at + 5 * len(more)]
                case "double":
                    raw[at:at] = raw[at : at + 5 * len(more)]
        path.write_bytes(bytes(raw))
        read_or_refused(path)


@given(60, st.sampled_from(["a.txt", "a.jsonl", "a.json", "a.csv", "a.txt.gz", "a.parquet"]), st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(name, content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        read_or_refused(path)
