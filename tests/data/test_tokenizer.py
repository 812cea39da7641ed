import itertools

import pytest
from tokenizers import Tokenizer

from preskip.data.corpus import Document
from preskip.data.tokenizer import END_OF_TEXT, fingerprint, load_tokenizer, train_tokenizer
from preskip.errors import PreskipError
from tiny_model import save_tiny_llama
from tiny_text import PROSE, tiny_tokenizer

DOCUMENTS = [Document("b", PROSE, "b"), Document("a", "Ünïcödé and\n\ttabs.", "a")]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(DOCUMENTS, 300)


def test_every_text_comes_back_also_of_bytes_never_seen(trained):
    text = " Don't\n\n  世界 \U0001f40b stop\t"
    assert trained.decode(trained(text)["input_ids"]) == text
    assert len(trained) == 300
    assert trained.convert_tokens_to_ids(END_OF_TEXT) == 0
    assert (trained.bos_token_id, trained.eos_token_id, trained.pad_token_id) == (0, 0, 0)


def test_the_merges_are_those_of_the_training_text(trained):
    """The commonest pair of bytes in words is merged first, counted by hand."""
    merges = Tokenizer.from_str(trained.backend_tokenizer.to_str())
    first = next(token for token, index in merges.get_vocab().items() if index == 257)
    words = " ".join(PROSE.split()).split(" ")
    counts: dict[str, int] = {}
    for number, word in enumerate(words):
        spelled = ("Ġ" if number else "") + word
        for pair in itertools.pairwise(spelled):
            counts["".join(pair)] = counts.get("".join(pair), 0) + 1
    assert counts[first] == max(counts.values())


def test_order_of_documents_does_not_matter(trained):
    assert fingerprint(train_tokenizer(DOCUMENTS[::-1], 300)) == fingerprint(trained)
    assert fingerprint(train_tokenizer(DOCUMENTS, 299)) != fingerprint(trained)


def test_sizes_that_cannot_be_reached():
    with pytest.raises(PreskipError, match="bytes alone take 256, give 258 or more"):
        train_tokenizer(DOCUMENTS, 200)
    with pytest.raises(PreskipError, match=r"gives only \d+ tokens"):
        train_tokenizer([Document("a", "abc abc", "a")], 4000)


def test_it_is_loaded_from_a_folder_a_file_and_a_model(trained, tmp_path):
    trained.save_pretrained(tmp_path / "alone")
    assert fingerprint(load_tokenizer(str(tmp_path / "alone"))) == fingerprint(trained)
    file = load_tokenizer(str(tmp_path / "alone" / "tokenizer.json"))
    assert (file.eos_token_id, fingerprint(file)) == (0, fingerprint(trained))
    model = save_tiny_llama(tmp_path / "model")
    assert fingerprint(load_tokenizer(str(model))) == fingerprint(tiny_tokenizer())


def test_a_file_that_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PreskipError, match=r"cannot be read .*: give a folder or a tokenizer.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(PreskipError):
        load_tokenizer(str(tmp_path / "nowhere"))
