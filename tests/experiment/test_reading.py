"""How much of a corpus a run reads: from scratch enough for its tokens, told and stored, the same on a resume."""

import itertools

import datasets
import numpy as np
import pytest

from preskip.data.splits import load_splits
from preskip.data.tokenizer import load_tokenizer
from preskip.errors import PreskipError
from preskip.experiment.frozen import Frozen
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.experiment.reading import reading_limit
from preskip.experiment.run import start_run
from preskip.experiment.scratch import Scratch
from preskip.experiment.scratch_inputs import most_tokens, plan_arms
from preskip.train.distributed import Crew
from small_probe import small_probe
from tiny_model import save_tiny_llama

SIZES = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
WORDS = np.random.default_rng(0).integers(0, 26, (500, 5))
WORDS = ["".join(chr(97 + letter) for letter in word) for word in WORDS]


def config(**options):
    return PretrainConfig(
        **{
            "overrides": {**SIZES, "intermediate_size": 64},
            "corpus": "some/set",
            "vocab_size": 400,
            "tokens": 20_480,
            "batch_size": 4,
            "seq_len": 16,
            "eval_blocks": 4,
            "eval_documents": 5,
            "device": "cpu",
            "dtype": "float32",
            "report_to": ("none",),
            **options,
        }
    )


def endless():
    for number in itertools.count():
        chosen = np.random.default_rng(number).choice(WORDS, 100)
        yield {"text": " ".join([f"Record {number}:", *chosen])}


@pytest.fixture
def hub(monkeypatch):
    """Put rows in the place of the Hub; returns how many have been read."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def put(rows):
        read = []
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *args, **options: (read.append(None) or row for row in rows())
        )
        return read

    return put


def prepared(settings, out, quiet=False):
    run = start_run(settings, out, ["preskip"])
    prepared, facts = Scratch.prepare(run, settings, quiet, Crew())
    return run, prepared.plans, facts


def test_an_endless_corpus_is_read_as_far_as_needed(hub, tmp_path, capsys):
    read = hub(endless)
    settings = config()
    run, plans, facts = prepared(settings, tmp_path / "run")
    told = capsys.readouterr().err
    corpus = facts["corpus"]
    most = max(plan.tokens for plan in plans.values())
    assert most == plans["base-flops"].tokens > plans["preskip"].tokens == 20_480
    assert corpus["training_tokens"] >= most
    # Nine tenths are to train or develop on, nine tenths of those to train on; the last document goes over the mark.
    wanted = 6 * most / 0.9 / 0.9
    lengths = np.cumsum([len(row["text"]) for row in itertools.islice(endless(), len(read))])
    count = 1 + int(np.argmax(lengths >= wanted))
    assert (corpus["documents_read"], corpus["characters_read"]) == (count, lengths[count - 1])
    assert len(read) == count + 1
    assert corpus["read_whole"] is False
    assert corpus["source"].endswith(f", the first {count:,} documents")
    amount = f"{count:,} documents ({lengths[count - 1]:,} characters)"
    line = f"corpus some/set: read the first {amount} and left the rest: enough for {most:,} training"
    assert line in told
    again = Scratch.prepare(run, settings, True, Crew())[1]["corpus"]
    assert again == corpus
    assert capsys.readouterr().err == ""


def test_the_parts_to_evaluate_on_are_filled_too(hub, tmp_path):
    hub(endless)
    options = {"tokens": 640, "arms": ("base",), "eval_documents": 30, "heldout_fraction": 0.25, "eval_blocks": 100}
    run, _, facts = prepared(config(**options), tmp_path / "run", quiet=True)
    assert facts["corpus"]["documents_read"] >= 120
    assert facts["corpus"]["heldout_documents"] >= 30
    assert facts["sets"]["set"]["documents"] == 30
    assert np.load(run.path / "data" / "development.npy").shape == (100, 16)


def test_a_corpus_that_ends_before_is_too_small(hub, tmp_path):
    hub(lambda: itertools.islice(endless(), 60))
    with pytest.raises(PreskipError, match=r"corpus some/set has .* would be read .* times; give more text or fewer"):
        prepared(config(), tmp_path / "run", quiet=True)
    _, _, facts = prepared(config(repeat=True), tmp_path / "other", quiet=True)
    assert (facts["corpus"]["documents_read"], facts["corpus"]["read_whole"]) == (60, True)


def test_tokens_longer_than_expected_are_named(hub, tmp_path):
    hub(lambda: ({"text": f"{number} " + "abcdefghijklmnopqrstuvwxyz " * 20} for number in itertools.count()))
    settings = config(tokens=6400, vocab_size=290, arms=("base",))
    with pytest.raises(PreskipError, match=r"the part of corpus some/set that was read has .* training tokens"):
        prepared(settings, tmp_path / "run", quiet=True)


@pytest.mark.parametrize("own", [False, True])
def test_the_longest_arm_is_known_before_the_tokenizer(tmp_path, own):
    model = save_tiny_llama(tmp_path / "model")
    settings = config(tokenizer=str(model) if own else None, tokens=1_000_000)
    run = start_run(settings, tmp_path / "run", ["preskip"])
    tokens = max(plan.tokens for plan in plan_arms(settings, load_tokenizer(str(model))).values())
    assert most_tokens(run, settings) == tokens > 1_000_000
    assert most_tokens(run, config(arms=("base", "preskip"))) == 20_480


def test_arithmetic_of_the_limit():
    settings = config(heldout_fraction=0.2, eval_documents=7, eval_blocks=1)
    limit = reading_limit(settings, 72_000)
    assert (limit.characters, limit.least_documents, limit.documents) == (600_000, 35, None)
    # 10,000 blocks of 16 are 160,000 tokens, a tenth of eight tenths: two million tokens in all.
    assert reading_limit(config(heldout_fraction=0.2, eval_blocks=10_000), 72_000).characters == 12_000_000


def test_a_local_table_is_read_as_far_as_needed(tmp_path, capsys):
    rows = datasets.Dataset.from_list(list(itertools.islice(endless(), 1000)))
    rows.to_parquet(tmp_path / "texts.parquet")
    capsys.readouterr()
    settings = config(corpus=str(tmp_path / "texts.parquet"), arms=("base",), tokens=1280)
    _, _, facts = prepared(settings, tmp_path / "run")
    assert facts["corpus"]["documents_read"] == 50  # for 5 held-out ones of a tenth
    assert list(facts["sets"]) == ["texts"]
    assert "texts.parquet: read the first 50 documents (" in capsys.readouterr().err


def test_padding_of_paragraphs_is_no_training_text(tmp_path):
    lines = [f"Ship {i} left the harbor in the morning and came back in the evening. " * (i % 4 + 1) for i in range(24)]
    (tmp_path / "lines.txt").write_text("\f".join(lines))
    options = {"packing": "paragraphs", "seq_len": 100, "last_word_items": 0, "lr_mode": "default"}
    settings = small_probe(tmp_path, corpus=str(tmp_path / "lines.txt"), **options)
    run = start_run(settings, tmp_path / "run", ["test"])
    prepared, facts = Frozen.prepare(run, settings, True, Crew())
    tokenizer, documents = prepared.tokenizer, load_splits(settings.corpus, heldout_fraction=0.4).training
    lengths = [len(tokenizer(document.text)["input_ids"]) for document in documents]
    assert min(lengths) < 100 < max(lengths)
    assert facts["corpus"]["training_tokens"] == sum(min(length, 100) for length in lengths)
    assert facts["corpus"]["training_passes"] == round(3 * 2 / len(documents), 2)
