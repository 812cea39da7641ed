"""Arms of peers through the real commands: trained, stored, compared, and read again."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import preskip.architecture  # noqa: F401
from conforming import run_faults
from preskip.cli.main import main
from preskip.errors import PreskipError
from preskip.evaluate.adapters import load_adapter
from preskip.peers.insert import peer_weights
from preskip.runs.weights import find_source
from preskip.serve.checkpoint import examine
from tiny_model import save_tiny_llama, tiny_llama, write_corpus

TINY = ["--num-layers", "2", "--hidden-size", "32", "--heads", "2", "--kv-heads", "2", "--mlp-width", "64"]
TINY += ["--vocab-size", "300", "--seq-len", "16", "--batch-size", "4", "--tokens", "512", "--eval-steps", "4"]
TINY += ["--eval-blocks", "4", "--eval-documents", "5", "--eval-words", "40", "--save-steps", "5", "--device", "cpu"]
TINY += ["--dtype", "float32", "--report-to", "none", "--peak-flops", "1e9", "--heldout-fraction", "0.3"]
FEW = ["--steps", "4", "--batch-size", "2", "--seq-len", "16", "--eval-documents", "4", "--eval-words", "30"]
FEW += ["--last-word-items", "6", "--context-length", "32", "--save-steps", "1", "--device", "cpu"]
FEW += ["--dtype", "float32", "--heldout-fraction", "0.4"]
IDS = torch.arange(10, 30)[None]


def call(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments)])
    return stop.value.code


def test_from_scratch(tmp_path):
    corpus = write_corpus(tmp_path / "records.jsonl", documents=24)
    arms = ["canon", "preskip", "preskip+canon-a", "value-residual", "preskip+value-embed"]
    run = tmp_path / "run"
    options = [*TINY, "--expansion", "2", "--lr", "3e-3", "--lr", "preskip+canon-a=1e-3"]
    assert call("pretrain", *options, "--corpus", corpus, "--arms", ",".join(arms), "--out", run, "--json") == 0
    assert not run_faults(run)
    manifest, results = (json.loads((run / name).read_text()) for name in ("run.json", "results.json"))
    assert [manifest["arms"][arm]["learning_rate"] for arm in arms] == [3e-3, 3e-3, 1e-3, 3e-3, 3e-3]
    budgets = ["smaller", "matched", "matched", "smaller", "larger"]
    assert [manifest["arms"][arm]["budget"] for arm in arms] == budgets
    assert set(results["arms"]) == set(arms)
    for arm in arms:
        model = AutoModelForCausalLM.from_pretrained(run / "arms" / arm / "seed-1" / "model").eval()
        assert bool(peer_weights(model)) == (arm not in ("preskip", "value-residual"))
        assert model(IDS).logits.isfinite().all()
    assert find_source(run).arm == "preskip"
    for arm in ("canon", "value-residual"):
        with pytest.raises(PreskipError, match=f"arm {arm} of .* has no branch: choose one of preskip"):
            find_source(run, arm=arm)
        folder = run / "arms" / arm / "seed-1" / "model"
        with pytest.raises(PreskipError, match="is a preskip_llama model, which has no branch"):
            find_source(folder)
        with pytest.raises(PreskipError, match=f"has {arm} in its blocks, which no engine would run"):
            examine(folder)


def test_frozen(tmp_path):
    model, corpus = save_tiny_llama(tmp_path / "model"), write_corpus(tmp_path / "corpus.jsonl")
    run = tmp_path / "run"
    given = [*FEW, "--corpus", corpus, "--arms", "none,canon,value-residual,content-gated", "--match", "none"]
    assert call("probe", model, *given, "--out", run, "--json") == 0
    assert not run_faults(run)
    manifest = json.loads((run / "run.json").read_text())
    sizes = {"canon": 2 * 4 * (32 + 64 + 32 + 128), "value-residual": 2, "content-gated": 2 * (7 * 32**2 // 2 + 33)}
    for arm, size in sizes.items():
        assert manifest["arms"][arm]["trainable_parameters"] == size
        assert manifest["arms"][arm]["settings"] == {}
        folder = run / "arms" / arm / "seed-42"
        cell = json.loads((folder / "cell.json").read_text())
        assert cell["kv_cache_bytes_per_token"] == 2 * 2 * 16 * 4
        live = load_adapter(tiny_llama(), folder / "adapter")
        weights = peer_weights(live)
        assert sum(weight.numel() for weight in weights.values()) == size
        assert not torch.equal(live(IDS).logits, tiny_llama()(IDS).logits)
        scored = ["--corpus", corpus, "--limit", "2", "--context-length", "32", "--dtype", "float32", "--device", "cpu"]
        assert call("eval", model, "--adapter", folder / "adapter", *scored, "--out", tmp_path / f"eval-{arm}") == 0
