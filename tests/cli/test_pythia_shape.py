"""Pythia-160M in shape, with random weights and the real GPT-NeoX tokenizer: probe, bake, generate at two layers."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from commands import preskip
from preskip.architecture.shapes import shape_config
from preskip.branch_settings import BranchSettings
from preskip.data.local import data_directory
from tiny_model import write_corpus

DATA = (data_directory() or Path("nowhere")) / "pythia" / "20B_tokenizer.json"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_file(), reason=f"no GPT-NeoX tokenizer at {DATA}"),
]


def test_weights_of_all_layers_are_as_eleutherai_counts_them():
    with torch.device("meta"):
        base, branched = (
            AutoModelForCausalLM.from_config(shape_config("pythia-160m", branch=branch))
            for branch in (None, BranchSettings())
        )
    assert base.num_parameters() == 162_322_944
    assert branched.num_parameters() - base.num_parameters() == 17_694_720 + 7_077_888


def test_probe_bake_and_generate(tmp_path, capsys):
    torch.manual_seed(0)
    config = shape_config("pythia-160m", branch=None, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DATA), eos_token="<|endoftext|>")
    assert len(tokenizer) == 50277
    tokenizer.save_pretrained(tmp_path / "model")
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    options = ["--steps", "2", "--batch-size", "1", "--seq-len", "32", "--eval-documents", "2", "--eval-words", "20"]
    options += ["--last-word-items", "0", "--context-length", "64", "--dtype", "float32", "--heldout-fraction", "0.4"]
    options += ["--arms", "none,preskip", "--seeds", "1", "--corpus", corpus, "--out", tmp_path / "run", "--json"]
    assert preskip("probe", tmp_path / "model", *options) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["arms"]["preskip"]["trainable_parameters"] == (17_694_720 + 7_077_888) * 2 // 12
    value = results["arms"]["none"]["metrics"]["corpus"]["bits_per_byte"]["value"]
    assert 2 < value < 6  # random weights: about log2(50304) bits per token of some 4 bytes

    capsys.readouterr()
    adapter = tmp_path / "run" / "arms" / "preskip" / "seed-1" / "adapter"
    assert preskip("bake", adapter, tmp_path / "baked", "--json") == 0
    assert json.loads(capsys.readouterr().out)["logits_difference"] == 0.0
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "baked")("The people of the", return_tensors="pt").input_ids
    made = [
        baked.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    ]
    assert torch.equal(made[0], made[1])
    assert made[0].shape == (1, ids.shape[1] + 4)
