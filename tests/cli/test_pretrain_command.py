"""`preskip pretrain` through the real command: a tiny architecture on a tiny corpus."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from filelock import FileLock
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from commands import preskip
from conforming import run_faults
from preskip.analysis.explain.texts import heldout_texts
from preskip.cli.main import main
from preskip.experiment.cell import opened, run_cell
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.experiment.probe_options import ProbeConfig
from preskip.experiment.run import start_run
from preskip.experiment.scratch import Scratch
from preskip.report.words.claims import assess
from preskip.runs.files import write_json, write_jsonl
from preskip.runs.weights import find_source, trained_context
from preskip.train.distributed import Crew
from tiny_model import write_corpus
from tiny_text import PROSE, tiny_tokenizer

TINY = ["--num-layers", "1", "--hidden-size", "32", "--heads", "2", "--kv-heads", "2", "--mlp-width", "64"]
TINY += ["--vocab-size", "300", "--seq-len", "16", "--batch-size", "4", "--tokens", "768", "--eval-steps", "4"]
TINY += ["--eval-blocks", "4", "--eval-documents", "5", "--eval-words", "40", "--save-steps", "5", "--device", "cpu"]
TINY += ["--dtype", "float32", "--report-to", "none", "--peak-flops", "1e9", "--heldout-fraction", "0.3"]
ARMS = ["base", "base-wide", "base-flops", "preskip"]


def call(*arguments):
    try:
        main(["pretrain", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "records.jsonl", documents=24)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """One finished run of the default arms with two seeds."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert call(*TINY, "--corpus", corpus, "--seeds", "1,2", "--out", run, "--json") == 0
    return run


@pytest.fixture(autouse=True)
def _no_page(monkeypatch):
    """The page is drawn for `finished` alone, and by the tests that read one."""
    monkeypatch.setattr("preskip.report.build_report", lambda run: run / "report.html")


@pytest.fixture
def again(finished, tmp_path):
    """A copy of it to break."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def refused(corpus, tmp_path, capsys):
    """Call with options that cannot work; returns the line on stderr, after checks that nothing is left behind."""

    def check(*arguments, corpus=corpus):
        small = [text for pair in zip(TINY[::2], TINY[1::2], strict=True) if pair[0] not in arguments for text in pair]
        code = call(*small, "--corpus", corpus, *arguments, "--out", tmp_path / "no")
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert (code, len(error)) == (1, 1)
        assert not (tmp_path / "no").exists()
        return error[0]

    return check


def stored(run, name):
    return json.loads((run / name).read_text())


def lines(run, arm, seed, name):
    return [json.loads(line) for line in (run / "arms" / arm / f"seed-{seed}" / name).open()]


def assert_cells_equal(run, finished, seeds=(1, 2)):
    for arm, seed in itertools.product(("base", "preskip"), seeds):
        assert lines(run, arm, seed, "items.jsonl") == lines(finished, arm, seed, "items.jsonl")


def test_the_run_holds_what_was_matched_and_what_came_out(finished):
    record, results = stored(finished, "run.json"), stored(finished, "results.json")
    assert (record["status"], record["kind"], results["kind"]) == ("finished", "pretrain", "pretrain")
    assert list(results["arms"]) == ARMS
    for arm, summary in results["arms"].items():
        assert summary["seeds"] == [1, 2]
        assert summary["parameters"] == record["arms"][arm]["parameters"] == summary["trainable_parameters"]
        rows = lines(finished, arm, 1, "train.jsonl")
        assert len(rows) == summary["steps"]
        assert sum(row["tokens"] for row in rows) == summary["tokens"] == 64 * summary["steps"]
        assert all(math.isfinite(row["loss"]) for row in rows)
        evaluated = [point["step"] for point in results["curves"][arm]["2"]]
        assert evaluated == sorted({*range(4, summary["steps"] + 1, 4), summary["steps"]})
    declared = {(entry["arm"], entry["reference"]) for entry in results["family"]["declared"]}
    assert declared == {("preskip", "base-wide"), ("preskip", "base-flops"), ("preskip", "base")}
    assert run_faults(finished) == []


def test_arms_of_a_seed_read_the_same_text_in_the_same_order(finished):
    """At the first step nothing is learned yet: base and base-flops, of equal weights, have the same loss."""
    base, flops = (lines(finished, arm, 1, "train.jsonl") for arm in ("base", "base-flops"))
    assert base[0]["loss"] == flops[0]["loss"]
    assert base[0]["loss"] != lines(finished, "base", 2, "train.jsonl")[0]["loss"]


def test_stored_scores_are_those_of_the_stored_model(finished):
    folder = finished / "arms" / "preskip" / "seed-1" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "PreskipLlamaForCausalLM"
    document = stored(finished, "data/heldout.json")[0]["documents"][0]
    row = next(row for row in lines(finished, "preskip", 1, "items.jsonl") if row["id"] == document["id"])
    ids = [0, *tokenizer(document["text"])["input_ids"]]
    nats = 0.0
    for end in range(16, len(ids) + 16, 16):  # windows of 16 scored tokens
        last = min(end, len(ids) - 1)
        first = max(0, last - 16)
        fresh = last - (end - 16)
        if fresh < 1:
            break
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[first:last]])).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[first + 1 : last + 1]), reduction="none")
        nats += losses[-fresh:].sum().item()
    assert row["nll"] == pytest.approx(nats, rel=1e-4)
    assert row["bytes"] == len(document["text"].encode())


def test_bits_per_byte_are_the_ratio_of_sums_over_seeds_and_documents(finished):
    rows = [row for seed in (1, 2) for row in lines(finished, "base-wide", seed, "items.jsonl")]
    expected = sum(row["nll"] for row in rows) / sum(row["bytes"] for row in rows) / math.log(2)
    metrics = stored(finished, "results.json")["arms"]["base-wide"]["metrics"]["records"]
    assert metrics["bits_per_byte"]["value"] == pytest.approx(expected)


def test_speed_over_seeds_goes_with_the_seconds_of_a_step(finished):
    arm = stored(finished, "results.json")["arms"]["base-wide"]
    speeds = [stored(finished, f"arms/base-wide/seed-{seed}/cell.json")["tokens_per_second"] for seed in (1, 2)]
    assert arm["tokens_per_second"] == pytest.approx(2 / (1 / speeds[0] + 1 / speeds[1]))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A finished run on rows of which each five are of one group."""
    folder = tmp_path_factory.mktemp("grouped")
    rows = [json.loads(line) for line in write_corpus(folder / "rows.jsonl", documents=60).open()]
    rows = [{**row, "group": f"book {place // 5}"} for place, row in enumerate(rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--corpus", folder / "rows.jsonl", "--eval-documents", "12", "--arms", "base,preskip", "--json"]
    assert call(*TINY, *options, "--out", folder / "run") == 0
    return folder / "run"


def test_documents_of_one_group_are_one_cluster(grouped):
    groups = {entry["id"]: entry["group"] for entry in stored(grouped, "data/heldout.json")[0]["documents"]}
    for arm in ("base", "preskip"):
        assert {row["id"]: row["cluster"] for row in lines(grouped, arm, 1, "items.jsonl")} == groups
    count = len(set(groups.values()))
    assert count == stored(grouped, "run.json")["sets"]["rows"]["clusters"] < len(groups)
    assert stored(grouped, "results.json")["comparisons"][0]["clusters"] == count
    texts, _ = heldout_texts(find_source(grouped), None, 12, 40, data_dir=None)
    assert len({text.group for text in texts}) == count  # as `preskip explain` reads them


def test_cells_of_before_groups_were_stored_get_their_clusters_by_a_resume(grouped, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(grouped, run)
    texts = stored(run, "data/heldout.json")
    write_json(run / "data" / "heldout.json", [
        {**text, "documents": [{"id": its["id"], "text": its["text"]} for its in text["documents"]]} for text in texts
    ])  # fmt: skip
    (run / "results.json").unlink()
    for arm in ("base", "preskip"):
        rows = [{key: row[key] for key in row if key != "cluster"} for row in lines(run, arm, 1, "items.jsonl")]
        write_jsonl(run / "arms" / arm / "seed-1" / "items.jsonl", rows)
    assert opened(run).heldout.texts[0].documents[0].group == texts[0]["documents"][0]["id"]  # readable as it is
    shutil.rmtree(run / "arms" / "base" / "seed-1")
    opened.cache_clear()
    assert call("--resume", run, "--json") == 0
    for arm in ("base", "preskip"):
        assert lines(run, arm, 1, "items.jsonl") == lines(grouped, arm, 1, "items.jsonl")
    assert stored(run, "results.json")["comparisons"] == stored(grouped, "results.json")["comparisons"]


def test_no_held_out_document_is_trained_on(finished):
    tokenizer = AutoTokenizer.from_pretrained(finished / "tokenizer")
    text = tokenizer.decode(np.fromfile(finished / "data" / "tokens.bin", dtype="<u2"))
    heldout = stored(finished, "data/heldout.json")[0]["documents"]
    assert heldout
    for document in heldout:
        assert document["text"].split(".")[0] + "." not in text  # "This is record 7."


@pytest.mark.parametrize(
    ("special", "opening", "closing"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, [0], [1]),
        ({"eos_token": "</s>"}, [], [1]),
        ({"cls_token": "<s>", "sep_token": "</s>"}, [], [0]),
    ],
)
def test_training_and_development_text_have_the_same_marks(tmp_path, special, opening, closing):
    """Around every document, however long, as it will be scored; never within one."""
    rows = [json.loads(line) for line in write_corpus(tmp_path / "rows.jsonl", documents=100).open()]
    long = [{**row, "text": "\n\n".join([row["text"], *[PROSE.strip()] * (4 + n % 3)])} for n, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    backend = tiny_tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path / "tokenizer")
    config = PretrainConfig(
        corpus=str(tmp_path / "rows.jsonl"),
        tokenizer=str(tmp_path / "tokenizer"),
        overrides={"num_hidden_layers": 1},
        arms=("base",),
        tokens=4096,
        batch_size=4,
        eval_blocks=9999,
        eval_documents=5,
        device="cpu",
        dtype="float32",
        report_to=("none",),
        peak_flops=1e9,
    )
    run = start_run(config, tmp_path / "run", [])
    prepared, _ = Scratch.prepare(run, config, True, Crew())
    between = [*closing, *opening]
    for part, blocks in (("training", prepared.blocks), ("development", prepared.development)):
        found = 0
        for block in blocks.tolist():
            marks = [place for place, token in enumerate(block) if token in (0, 1)]
            assert {block[place] for place in marks} <= set(between), part
            for place in (place for place in marks if block[place] == closing[0] and place < len(block) - 20):
                assert block[place : place + len(between)] == between, part
                behind = prepared.tokenizer.decode(block[place + len(between) :])
                assert behind.startswith("This is record "), part
                found += 1
        assert found, part


def test_a_resumed_run_keeps_its_development_text_and_is_refused_other_tokens(again, capsys):
    """What an earlier preskip packed otherwise stays; made anew, it would not be what the finished cells read."""
    shutil.rmtree(again / "arms" / "base" / "seed-1")
    kept = again / "data" / "development.npy"
    np.save(kept, np.load(kept)[::-1].copy())
    before = kept.read_bytes()
    record = stored(again, "run.json")
    other = {**record, "corpus": {**record["corpus"], "packed_sha256": "0" * 64}}
    (again / "run.json").write_text(json.dumps(other))
    assert call("--resume", again) == 1
    assert "the training text now becomes other tokens than when this run began" in capsys.readouterr().err
    (again / "run.json").write_text(json.dumps(record))
    assert call("--resume", again, "--json") == 0
    assert kept.read_bytes() == before


def test_what_is_missing_is_computed_again_with_the_same_result(again, finished, capsys):
    before = (again / "arms" / "base" / "seed-1" / "cell.json").stat().st_mtime_ns
    shutil.rmtree(again / "arms" / "preskip" / "seed-2")
    (again / "results.json").unlink()
    assert call("--resume", again, "--json") == 0
    assert (again / "arms" / "base" / "seed-1" / "cell.json").stat().st_mtime_ns == before
    assert lines(again, "preskip", 2, "items.jsonl") == lines(finished, "preskip", 2, "items.jsonl")
    one, two = stored(again, "results.json"), stored(finished, "results.json")
    assert one["comparisons"] == two["comparisons"]
    assert one["curves"] == two["curves"]


def test_a_cell_needs_the_run_directory_alone(again, finished, corpus, tmp_path, monkeypatch):
    shutil.rmtree(again / "arms" / "base-wide" / "seed-1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PRESKIP_DATA", raising=False)
    summary = run_cell(again, "base-wide", 1)
    assert summary["final_eval_loss"] == stored(finished, "arms/base-wide/seed-1/cell.json")["final_eval_loss"]


def test_the_branch_is_measured_by_layer(finished):
    folder = finished / "arms" / "preskip" / "seed-2"
    (row,) = stored(finished, "results.json")["depth"]["preskip"]["2"]
    assert list(stored(finished, "results.json")["depth"]) == ["preskip"]
    weights = load_file(folder / "model" / "model.safetensors")
    expected = weights["model.layers.0.self_attn.preskip.skip.weight"].norm().item()
    assert row["skip_norm"] == pytest.approx(expected, rel=1e-5)
    assert row["skip_to_attention_low"] <= row["skip_to_attention"] <= row["skip_to_attention_high"]
    sums = json.loads((folder / "cell.json").read_text())["depth"][0]["documents"]["enrichment"]
    assert row["enrichment"] == pytest.approx(sum(sums["above"]) / sum(sums["below"]))
    assert "The branch by layer" in (finished / "report.html").read_text()


def test_compare_and_report_read_it(finished, capsys):
    with pytest.raises(SystemExit):
        main(["compare", str(finished), "--arms", "preskip,base-wide", "--json"])
    entry = next(e for e in json.loads(capsys.readouterr().out)["comparisons"] if e["metric"] == "bits_per_byte")
    assert (entry["arm"], entry["reference"], entry["seeds"], entry["declared"]) == ("preskip", "base-wide", 2, True)
    page = (finished / "report.html").read_text()
    for words in ("Size and compute of the arms", "training FLOPs", "Loss on development documents"):
        assert words in page
    assert "preskip pretrain --resume" in page
    assert "LoRA at equal budget" not in page


def test_the_claims_are_those_of_training_from_scratch(finished):
    claims = {claim["id"]: claim for claim in assess(stored(finished, "run.json"), stored(finished, "results.json"))}
    assert claims["scratch-base-flops"]["reference"] == "base-flops"
    assert claims["scratch-base"]["verdict"] in ("supported", "contradicted", "not shown")
    assert claims["scratch-parallel"]["verdict"] == "not measured"


def test_plans_are_printed_before_training(corpus, tmp_path, capsys):
    assert call(*TINY, "--corpus", corpus, "--arms", "base,base-deep,skip", "--out", tmp_path / "run") == 0
    captured = capsys.readouterr()
    assert "base-deep" in captured.err
    assert "parameters" in captured.err
    assert captured.err.index("training PFLOP") < captured.err.index("cell 1 of 3")
    declared = stored(tmp_path / "run", "results.json")["family"]["declared"]
    assert [(entry["arm"], entry["reference"]) for entry in declared] == [("base-deep", "base")]


def test_a_tokenizer_that_exists_is_taken(finished, corpus, tmp_path):
    run = tmp_path / "run"
    options = [
        "--tokenizer",
        finished / "tokenizer",
        "--vocab-size",
        "2048",
        "--arms",
        "base",
        "--set",
        "vocab_size=320",
        "--out",
        run,
    ]
    assert call(*TINY, "--corpus", corpus, *options, "--json") == 0
    assert stored(run, "run.json")["model"]["vocab_size"] == 320
    assert (run / "data" / "tokens.bin").read_bytes() == (finished / "data" / "tokens.bin").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "1M"], "would be read .* times; give more text or fewer --tokens, or allow it with --repeat"),
        (["--tokens", "many"], "'many' is not a number of tokens"),
        (["--tokens", "10"], "less than one step"),
        (["--arms", "base,lora"], "unknown arm 'lora'"),
        (["--lr", "skip=1e-3"], "names 'skip', which is not compared"),
        (["--lr", "fast"], "not a number or arm=number"),
        (["--micro-batch-size", "3"], "does not divide"),
        (["--seq-len", "4096", "--tokens", "1M"], "exceed the architecture's context of 2048"),
        (["--heads", "3"], "cannot be shared by 3 heads"),
        (["--layers", "4"], r"preskip_layers=\[4\] is not possible with 1 layers"),
        (["--arch", "llama-2m"], "did you mean llama-"),
        (["--set", "colour"], "not FIELD=VALUE"),
        (["--set", "hidden_size=64"], "--hidden-size and --set hidden_size give the same: leave one of them out"),
        (["--set", "hidden_act=nonsense"], "no model can be made of this architecture, check --arch and --set: .*nons"),
        (["--mlp-width", "-4"], "no model can be made of this architecture, check --arch and --set"),
        (["--eval-corpora", "pydoc:2x9,pydoc:3x9"], "--eval-corpora names pydoc twice"),
        (["--vocab-size", "60000"], "gives only .* tokens"),
        (["--set", "vocab_size=2k"], "vocab_size '2k' is not a whole number: give 300 or more"),
        (["--set", "vocab_size=299"], "too small for .*, whose ids go up to 299: raise it to 300"),
        (["--tokenizer", "nowhere/tokenizer", "--vocab-size", "2048"], "nowhere"),
        (["--report-to", "tensorboard"], "pip install tensorboard"),
        (["--report-to", "wanbd"], "wanbd is unknown to transformers"),
        (["--attn-implementation", "foo"], "--attn-implementation foo cannot be used here .* try eager or sdpa"),
        (["--skip-rank", "64"], "skip_rank=64 exceeds the width 32"),
        (["--eval-corpora", "pydoc:1x9"], "too small"),
        (["--workers", "0"], "at least 1"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(refused, options, message, monkeypatch):
    monkeypatch.setattr("preskip.train.scratch.find_spec", lambda name: None)
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert re.search(message, refused(*options))


def test_an_architecture_is_checked_before_any_text_is_read(refused, monkeypatch):
    monkeypatch.setattr("preskip.experiment.scratch.load_corpora", lambda *_, **__: pytest.fail("text was read"))
    assert "did you mean llama-" in refused("--arch", "llama-2m", "--arms", "base,preskip")
    assert "nowhere" in refused("--tokenizer", "nowhere/tokenizer", "--vocab-size", "2048", "--arms", "base")


def test_what_a_tokenizer_lacks_is_said_and_noted(corpus, tmp_path, capsys):
    backend = Tokenizer(WordLevel({"the": 0, "is": 1, "record": 2, "[UNK]": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path / "words")
    options = ["--tokenizer", tmp_path / "words", "--arms", "base", "--vocab-size", "2048", "--out", tmp_path / "run"]
    assert call(*TINY, "--corpus", corpus, *options) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "keeps 2,048 embeddings for the 4 tokens of the tokenizer: --set vocab_size=4 leaves the others out" in said
    assert "the tokenizer has no end token: documents follow each other without a mark" in said
    (described,) = stored(tmp_path / "run", "results.json")["sets"].values()
    assert "does not keep the text of 5 of its documents" in described["notes"][0]


@pytest.mark.parametrize("split", [False, True])
def test_special_tokens_in_a_text_are_read_as_the_option_says(tmp_path, split):
    rows = [json.loads(line) for line in write_corpus(tmp_path / "rows.jsonl", documents=24).open()]
    marked = [{**row, "text": row["text"].replace(" ", " <|endoftext|> ", 1)} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    options = ["--arms", "base", "--out", tmp_path / "run", *(["--split-special-tokens"] if split else [])]
    assert call(*TINY, "--corpus", tmp_path / "rows.jsonl", *options, "--json") == 0
    facts = stored(tmp_path / "run", "run.json")["corpus"]
    ends = int((np.fromfile(tmp_path / "run" / "data" / "tokens.bin", dtype=np.uint16) == 0).sum())
    assert ends == facts["training_documents"] * (1 if split else 2)


def test_too_little_development_text_is_not_called_training_text(refused, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"Row {number} is short."}) + "\n" for number in range(20)))
    error = refused("--vocab-size", "260", "--seq-len", "64", corpus=rows)
    assert re.search(r"\b\d\d? development tokens do not fill one block of 64; .* or lower the sequence length$", error)


def test_layers_are_those_that_get_a_branch_and_the_depth_has_another_name(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--num-layers", "2", "--layers", "1", "--arms", "preskip", "--out", run]
    assert call(*TINY, "--corpus", corpus, *options) == 0
    assert "layer 1 alone gets a branch; the depth is --num-layers" in capsys.readouterr().err
    config = stored(run, "run.json")["config"]
    assert (config["layers"], config["overrides"]["num_hidden_layers"]) == ([1], 2)
    weights = load_file(run / "arms" / "preskip" / "seed-1" / "model" / "model.safetensors")
    assert {name.split(".")[2] for name in weights if "preskip" in name} == {"1"}
    assert {name.split(".")[2] for name in weights if ".layers." in name} == {"0", "1"}


def test_the_file_of_an_architecture_is_part_of_the_run(corpus, tmp_path, monkeypatch, capsys):
    """Another activation has as many weights: only the run's own copy tells it."""
    (tmp_path / "begun").mkdir()
    monkeypatch.chdir(tmp_path / "begun")
    file = tmp_path / "begun" / "config.json"
    file.write_text('{"model_type": "llama", "hidden_act": "silu", "vocab_size": 999}')
    run = tmp_path / "run"
    options = ["--arch", "config.json", "--corpus", corpus, "--arms", "base,preskip", "--out", run]
    assert call(*TINY, *options, "--json") == 0
    before = {arm: lines(run, arm, 1, "items.jsonl") for arm in ("base", "preskip")}
    file.write_text(file.read_text().replace("silu", "gelu"))
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(run / "arms")
    opened.cache_clear()
    run_cell(run, "base", 1)
    assert call("--resume", run, "--json") == 0
    assert {arm: lines(run, arm, 1, "items.jsonl") for arm in ("base", "preskip")} == before
    capsys.readouterr()
    kept = run / "arch.json"
    kept.write_text(kept.read_text().replace("silu", "gelu"))
    assert call("--resume", run) == 1
    assert "model config.json has changed since this run began" in capsys.readouterr().err


def test_text_is_repeated_if_that_is_allowed(corpus, tmp_path):
    run = tmp_path / "run"
    options = ["--arms", "base", "--tokens", "20k", "--batch-size", "64", "--repeat"]
    assert call(*TINY, "--corpus", corpus, *options, "--out", run, "--json") == 0
    assert stored(run, "run.json")["corpus"]["training_passes"] > 1


def test_weights_and_tokenizer_are_on_the_disk_before_what_names_them_done(again, monkeypatch):
    """What a power cut leaves: every file was synced before cell.json was, and before the tokenizer had its name."""
    shutil.rmtree(again / "arms" / "base" / "seed-1")
    shutil.rmtree(again / "tokenizer")
    synced, fsync = [], os.fsync

    def recorded(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", recorded)
    assert call("--resume", again, "--json") == 0
    cell = again / "arms" / "base" / "seed-1"
    done = next(place for place, path in enumerate(synced) if path.startswith(f"{cell}/.cell.json."))
    written = {str(path) for path in (cell / "model").iterdir() if path.name != "README.md"}  # the card comes last
    assert written | {str(cell / "model")} <= set(synced[:done])
    for path in (again / "tokenizer").iterdir():
        assert str(again / ".tokenizer" / path.name) in synced


def test_a_corrupt_shard_is_refused_by_a_cell_and_mended_by_a_resume(again, finished, capsys):
    shutil.rmtree(again / "arms" / "base" / "seed-1")
    content = bytearray((again / "data" / "tokens.bin").read_bytes())
    content[0] ^= 1
    (again / "data" / "tokens.bin").write_bytes(content)
    from preskip.errors import PreskipError

    with pytest.raises(PreskipError, match=r"tokens\.bin is damaged"):
        run_cell(again, "base", 1)
    assert call("--resume", again, "--json") == 0
    assert lines(again, "base", 1, "items.jsonl") == lines(finished, "base", 1, "items.jsonl")


def test_other_text_under_the_same_name_is_refused(again, corpus, tmp_path, capsys):
    record = stored(again, "run.json")
    other = write_corpus(tmp_path / "records.jsonl")
    other.write_text(other.read_text().replace("record", "report"))
    record["config"]["corpus"] = str(other)
    (again / "run.json").write_text(json.dumps(record))
    before = {path: path.read_bytes() for path in again.rglob("*") if path.is_file() and path.name != ".lock"}
    for seeds in ([], ["--seeds", "1,2,3"]):
        assert call("--resume", again, *seeds) == 1
        assert f"corpus {other} has changed since this run began" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in before} == before  # still finished, its texts as they were


@pytest.mark.parametrize(("kind", "other"), [(ProbeConfig, "pretrain"), (PretrainConfig, "probe")])
def test_a_run_of_the_other_command_is_refused(kind, other, tmp_path, capsys):
    start_run(kind(), tmp_path / "run", [])
    assert preskip(other, "--resume", tmp_path / "run") == 1
    assert f"resume it with `preskip {kind.command} --resume`" in capsys.readouterr().err


def test_a_resume_takes_no_options(tmp_path, capsys):
    assert call("--resume", tmp_path, "--tokens", "5M") == 1
    assert "leave out tokens" in capsys.readouterr().err


# The command, which its workers import, too: every training stays where it has its first checkpoint.
STAYING = """
import time
from preskip.cli.main import main
from preskip.train.checkpoints import ResumableTrainer

save = ResumableTrainer._save_checkpoint


def save_and_stay(*arguments):
    save(*arguments)
    time.sleep(600)


ResumableTrainer._save_checkpoint = save_and_stay
if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_a_terminated_run_ends_its_workers_and_is_finished_by_others(finished, corpus, tmp_path, capfd):
    run = tmp_path / "run"
    arguments = ["pretrain", *TINY, "--corpus", str(corpus), "--arms", "base,preskip", "--seeds", "1"]
    arguments += ["--workers", "2", "--out", str(run)]
    (tmp_path / "staying.py").write_text(STAYING)
    process = subprocess.Popen([sys.executable, tmp_path / "staying.py", *arguments], stderr=subprocess.DEVNULL)
    workers = []
    try:
        while len(list(run.glob("arms/*/seed-1/checkpoints/checkpoint-*"))) < 2:
            assert process.poll() is None, "it ended before it was terminated"
            time.sleep(0.02)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(120) == 143
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert len(workers) >= 2
        assert not alive
    finally:
        for left in (process, *workers):
            with suppress(psutil.NoSuchProcess):
                left.kill()
    assert stored(run, "run.json")["status"] == "interrupted"
    assert call("--resume", run, "--workers", "2") == 0
    assert "cell 2 of 2 done: " in capfd.readouterr().err
    assert_cells_equal(run, finished, seeds=(1,))


def test_the_saved_model_generates_with_its_cache(finished):
    folder = finished / "arms" / "preskip" / "seed-1" / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["use_cache"] is True
    # With trust_remote_code it is opened where nothing has imported preskip, as a baked one is.
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_preskip.PreskipLlamaForCausalLM"
    assert "import PreskipLlamaConfig" in (folder / "modeling_preskip.py").read_text()
    assert not (finished / "arms" / "base" / "seed-1" / "model" / "modeling_preskip.py").exists()


def test_a_saved_model_is_scored_with_the_context_that_it_was_trained_on(finished, corpus, capsys):
    folder = finished / "arms" / "preskip" / "seed-1" / "model"
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] > 16
    capsys.readouterr()
    assert preskip("eval", folder, "--corpus", corpus, "--limit", "2", "--device", "cpu", "--json") == 0
    assert json.loads(capsys.readouterr().out)["context_length"] == 16
    assert trained_context(folder) == 16
    assert trained_context(folder.parent) is None
    assert trained_context(Path("/")) is None


def test_the_saved_model_has_a_card(finished):
    folder = finished / "arms" / "preskip" / "seed-2" / "model"
    card = ModelCard.load(folder / "README.md")
    metrics = stored(finished, "results.json")["arms"]["preskip"]["metrics"]["records"]
    assert {entry.metric_type: entry.metric_value for entry in card.data.eval_results} == {
        metric: value["value"] for metric, value in metrics.items()
    }
    assert "trained from scratch" in card.text
    assert (folder / "depth.png").is_file()
    base = finished / "arms" / "base" / "seed-2" / "model"
    assert "import preskip" not in (base / "README.md").read_text()
    assert not (base / "depth.png").exists()


def test_a_run_in_use_is_refused(again, capsys):
    with FileLock(again / ".lock"):
        assert call("--resume", again) == 1
    assert "another process is working on" in capsys.readouterr().err
    assert call("--resume", again) == 0
