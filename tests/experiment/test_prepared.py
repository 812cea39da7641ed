"""What a run is prepared from: workers, tasks on Ray and followers do it anew, from the same inputs or not at all."""

import json
from pathlib import Path

import pytest

from preskip.data.splits import load_splits
from preskip.errors import PreskipError
from preskip.experiment.cell import opened
from preskip.experiment.frozen import _training_blocks
from preskip.experiment.probe_options import ProbeConfig
from preskip.experiment.results import summarise_run
from preskip.experiment.run import finish_run, start_run
from small_probe import small_probe
from tiny_model import write_corpus
from tiny_text import tiny_tokenizer


def test_a_process_that_reads_another_corpus_than_the_run_is_refused(tmp_path):
    config = small_probe(tmp_path, steps=2, last_word_items=0, lr_mode="default", seeds=(1,))
    run = start_run(config, tmp_path / "run", ["test"])
    finish_run(run, quiet=True)
    assert opened(run.path).run.path == run.path
    opened.cache_clear()
    corpus = Path(config.corpus)
    corpus.write_text(corpus.read_text(encoding="utf-8").replace("the", "thy", 1), encoding="utf-8")
    with pytest.raises(PreskipError, match=r"corpus .* has changed since this run began"):
        opened(run.path)


@pytest.mark.parametrize("lead", [True, False])
def test_blocks_to_train_on_begin_as_the_tokenizer_begins_a_text(tmp_path, lead):
    splits = load_splits(str(write_corpus(tmp_path / "corpus.jsonl", 30)))
    tokenizer = tiny_tokenizer(lead=lead)
    blocks = _training_blocks(ProbeConfig(steps=5, batch_size=2, seq_len=16), splits, tokenizer, True)(1)
    assert set(blocks[:, 0] == tokenizer.bos_token_id) == {lead}
    assert blocks.shape == (10, 16)
    assert tokenizer.bos_token_id not in blocks[:, 1:]


def test_a_model_that_needs_a_start_token_is_said_to_be_trained_without_it(tmp_path, monkeypatch, capsys):
    """Measured once, and stored: what resumes the run and what works for it take that."""
    monkeypatch.setattr("preskip.experiment.frozen.start_gain", lambda *_, **__: 1.9)
    config = small_probe(tmp_path, steps=2, last_word_items=0, lr_mode="default", seeds=(1,))
    run = start_run(config, tmp_path / "run", ["test"])
    results = finish_run(run)
    said = "reads the training blocks 1.90 nats per token better behind its start token"
    assert said in " ".join(capsys.readouterr().err.split())
    assert any(said in note for note in results["notes"])
    monkeypatch.setattr("preskip.experiment.frozen.start_gain", lambda *_, **__: 0.0)
    assert any(said in note for note in finish_run(run)["notes"])
    assert run.manifest["tokenizer"]["start_gain"] == 1.9
    assert run.manifest["model"]["stacked_experts"] == 0.0
    assert not any("stacked in one tensor" in note for note in results["notes"])
    described = run.manifest["model"] | {"stacked_experts": 0.6}
    run.update_manifest(model=described, arms={"lora": {}, **run.manifest["arms"]})
    assert any("60% of the model's weights are experts" in note for note in summarise_run(run)["notes"])


def test_a_finished_run_whose_blocks_lacked_the_start_token_takes_no_further_seeds(tmp_path, monkeypatch):
    """Resumed as it is, it keeps the first attempt's facts."""
    config = small_probe(tmp_path, steps=2, last_word_items=0, lr_mode="default", seeds=(1,))
    run = start_run(config, tmp_path / "run", ["test"])
    finish_run(run, quiet=True)
    old = {key: value for key, value in run.manifest["tokenizer"].items() if key != "opening"}
    run.update_manifest(tokenizer=old)
    monkeypatch.setattr("preskip.experiment.frozen.opening_token", lambda tokenizer: 0)
    finish_run(run, quiet=True)
    assert run.manifest["tokenizer"] == old
    with pytest.raises(PreskipError, match="left the start token out of the blocks it trains on"):
        finish_run(run, seeds=(1, 2), quiet=True)


@pytest.mark.parametrize("split", [False, True])
def test_special_tokens_in_a_text_are_read_as_the_option_says(tmp_path, split):
    """In training, development and held-out texts alike; transformers' own default reads them as special."""
    config = small_probe(tmp_path, steps=2, last_word_items=0, seeds=(1,), split_special_tokens=split)
    corpus = Path(config.corpus)
    rows = [json.loads(line) for line in corpus.read_text(encoding="utf-8").splitlines()]
    key = next(key for key, value in rows[0].items() if " the " in str(value))
    rows = [{**row, key: row[key].replace(" the ", " <s> ")} for row in rows]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    prepared = opened(start_run(config, tmp_path / "run", ["test"]).path)
    start = prepared.tokenizer.bos_token_id
    blocks = prepared.blocks(1)
    assert (start in blocks[:, 1:]) is not split
    texts = [*prepared.heldout.texts, *prepared.heldout.development]
    scored = [token for text in texts for window in text.windows for token in window.input_ids[window.scored_from :]]
    assert (start in scored) is not split
