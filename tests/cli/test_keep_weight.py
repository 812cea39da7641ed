"""`preskip probe --keep-weight`: other text than what is scored, a column of the log, refusals."""

import json

import pytest

from conforming import run_faults
from preskip.cli.main import main
from preskip.data.splits import load_splits
from preskip.experiment.frozen import _kept_blocks
from preskip.experiment.heldout import Scored
from preskip.experiment.probe_options import ProbeConfig
from preskip.runs.files import read_jsonl
from tiny_model import save_tiny_llama, write_corpus
from tiny_text import tiny_tokenizer

FEW = ["--steps", "4", "--batch-size", "2", "--seq-len", "16", "--eval-documents", "4", "--eval-words", "30"]
FEW += ["--last-word-items", "0", "--context-length", "32", "--device", "cpu", "--dtype", "float32"]


def call(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    return stop.value.code


def test_it_is_trained_with_and_logged(tmp_path, capsys):
    model = save_tiny_llama(tmp_path / "model")
    home, other = (write_corpus(tmp_path / f"{name}.jsonl", 30) for name in ("home", "other"))
    given = ["probe", model, *FEW, "--corpus", home, "--arms", "none,preskip,full", "--heldout-fraction", "0.4"]
    run = tmp_path / "run"
    assert call(*given, "--eval-corpora", other, "--keep-weight", "0.5", "--out", run, "--json") == 0
    assert not run_faults(run)
    assert json.loads((run / "run.json").read_text())["config"]["keep_weight"] == 0.5
    for arm in ("preskip", "full"):
        rows = read_jsonl(run / "arms" / arm / "seed-42" / "train.jsonl")
        assert rows[0]["keep_kl"] == pytest.approx(0, abs=1e-7)
        assert all(row["keep_kl"] >= -1e-7 for row in rows)
        assert rows[-1]["keep_kl"] > 1e-9
    capsys.readouterr()
    assert call(*given, "--eval-corpora", home, "--keep-weight", "1", "--out", tmp_path / "refused") == 1
    assert "--keep-weight needs text out of domain" in capsys.readouterr().err
    assert call(*given, "--keep-weight", "-1", "--out", tmp_path / "refused") == 1


def test_the_text_to_keep_is_of_training_documents_alone(tmp_path, monkeypatch):
    import preskip.experiment.frozen as frozen

    seen = []
    monkeypatch.setattr(frozen, "pack_blocks", lambda documents, *rest, **more: seen.append((documents, more)))
    home, other = (load_splits(str(write_corpus(tmp_path / f"{name}.jsonl", 30))) for name in ("home", "other"))
    corpora = [Scored(home, 4, 30, "in"), Scored(other, 4, 30, "out")]
    config = ProbeConfig(keep_weight=1.0, steps=5, batch_size=6, seq_len=16)
    _kept_blocks(config, corpora, tiny_tokenizer(lead=True), True)
    (documents, more), *_ = seen
    assert [document.id for document in documents] == [document.id for document in other.training]
    scored = {document.id for document in (*other.heldout, *other.development)}
    assert not scored & {document.id for document in documents}
    assert more["limit_tokens"] == 10 * 16  # two of the six of each step
    assert more["opening"] == tiny_tokenizer().bos_token_id
