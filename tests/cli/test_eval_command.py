"""`preskip eval` through the real command, on a tiny model in a folder."""

import errno
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from lm_eval.utils import get_results_filenames, get_sample_results_filenames
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conforming import file_faults
from local_data import SENTENCES, write_local_data
from own_tasks import write_own_tasks
from preskip import PreskipConfig
from preskip.arms import ARMS
from preskip.arms.arm import ArmContext
from preskip.arms.budget import attention_paths
from preskip.arms.insert import insert
from preskip.branch_settings import BranchSettings
from preskip.cli.evaluate import _dtypes
from preskip.cli.main import main
from preskip.peers.insert import attach_peers
from preskip.runs.schema import EvalResults, Record
from tiny_model import save_tiny_llama, tiny_llama, write_corpus

FAST = ["--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_llama(folder / "model", max_position_embeddings=512)
    write_corpus(folder / "texts.jsonl", 5)
    write_local_data(folder / "data")
    settings = {
        "lora": LoraConfig(init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "preskip": PreskipConfig(init_weights="paper", init_std=0.3, skip_init_std=0.3),
    }
    for name, config in settings.items():
        get_peft_model(tiny_llama(), config).save_pretrained(folder / name)
    return folder


@pytest.fixture
def call(inputs, capsys, monkeypatch):
    """Call `preskip eval`; returns exit code, stdout and stderr."""
    monkeypatch.setenv("PRESKIP_DATA", str(inputs / "data"))

    def run(*arguments, model=inputs / "model"):
        code = 0
        try:
            main(["eval", str(model), *FAST, *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_tasks_and_texts_with_intervals_and_records(call, inputs, tmp_path):
    options = ["--tasks", "lambada_openai,arc_easy", "--corpus", inputs / "texts.jsonl", "--context-length", "64"]
    code, stdout, _ = call(*options, "--stride", "32", "--out", tmp_path / "out", "--json")
    assert code == 0
    printed = json.loads(stdout)
    stored = json.loads((tmp_path / "out/results.json").read_text())
    assert printed == {"out": str(tmp_path / "out"), **stored}
    assert list(file_faults(tmp_path / "out/results.json", EvalResults)) == []
    assert list(file_faults(tmp_path / "out/items.jsonl", Record)) == []
    records = [json.loads(line) for line in (tmp_path / "out/items.jsonl").open()]
    assert set(printed["metrics"]) == set(printed["sets"]) == {"texts", "lambada_openai", "arc_easy"}
    assert (printed["dtype"], printed["adapter_dtype"], printed["device"]) == ("float32", None, "cpu")
    assert (printed["context_length"], printed["stride"]) == (64, 32)
    by_set = {name: [record for record in records if record["set"] == name] for name in printed["sets"]}
    assert len(by_set["lambada_openai"]) == len(SENTENCES)
    texts = by_set["texts"]
    bits = sum(record["nll"] for record in texts) / math.log(2) / sum(record["bytes"] for record in texts)
    measured = printed["metrics"]["texts"]["bits_per_byte"]
    assert measured["value"] == pytest.approx(bits)
    assert measured["low"] < bits < measured["high"]
    assert set(printed["metrics"]["arc_easy"]) == {"acc", "acc_norm", "nll"}
    accuracy = printed["metrics"]["arc_easy"]["acc"]["value"]
    assert printed["lm_eval"]["arc_easy"]["acc"] == pytest.approx(accuracy)
    nll = printed["metrics"]["lambada_openai"]["nll"]["value"]
    assert printed["lm_eval"]["lambada_openai"]["perplexity"] == pytest.approx(math.exp(nll))


def test_the_table_states_dtype_context_and_stride(call, tmp_path):
    out = tmp_path / "records.jsonl"
    code, stdout, stderr = call("--tasks", "wikitext,hellaswag", "--limit", "4", "--out", out)
    assert code == 0
    assert "base weights float32 (as asked), attention sdpa, cpu" in stderr
    assert "context 512 tokens, stride 512 on texts" in stderr
    for text in ("bits_per_byte", "word_perplexity", "byte_perplexity", "acc_norm", "2 documents", "4 items"):
        assert text in stdout
    assert len(out.read_text().splitlines()) == 6


@pytest.mark.parametrize("name", ["lora", "preskip"])
def test_an_adapter_of_any_type_changes_the_scores(call, inputs, name):
    options = ["--tasks", "lambada_openai", "--limit", "5", "--json"]
    base, adapted = (json.loads(call(*options, *extra)[1]) for extra in ([], ["--adapter", inputs / name]))
    assert base["sets"] == adapted["sets"]
    assert adapted["adapter_dtype"] == "float32"
    weights = {"lora": 2 * 2 * 8 * 32, "preskip": int(3.5 * 32**2) * 2}[name]
    assert adapted["adapter_parameters"] == weights
    assert adapted["parameters"] == base["parameters"] + weights
    values = [result["metrics"]["lambada_openai"]["nll"]["value"] for result in (base, adapted)]
    assert abs(values[0] - values[1]) > 1e-5


@pytest.mark.parametrize("arm", ["canon", "full"])
def test_arms_that_are_no_peft_adapter_are_read_and_counted(call, inputs, tmp_path, arm):
    base = AutoModelForCausalLM.from_pretrained(inputs / "model").requires_grad_(False)
    context = ArmContext(
        base=base,
        settings=BranchSettings(),
        skip_position="attention",
        layers=None,
        targets=tuple(attention_paths(base)),
        budget=10**6,
        match="none",
    )
    with insert(ARMS[arm], context, seed=1) as inserted:
        generator = torch.Generator().manual_seed(1)
        for weight in inserted.trainable.values():
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
        count = inserted.parameters
        inserted.save(tmp_path / "own")
    options = ["--tasks", "lambada_openai", "--limit", "5", "--json"]
    plain, own = (json.loads(call(*options, *extra)[1]) for extra in ([], ["--adapter", tmp_path / "own"]))
    assert (own["adapter_parameters"], own["adapter_dtype"]) == (count, "float32")
    assert own["parameters"] == plain["parameters"] + (count if arm == "canon" else 0)
    values = [result["metrics"]["lambada_openai"]["nll"]["value"] for result in (plain, own)]
    assert abs(values[0] - values[1]) > 1e-5
    if arm == "canon":  # peers of a model itself are none of an adapter's weights
        base = tiny_llama(max_position_embeddings=512)
        attach_peers(base, {"canon": {"sites": "A"}})
        assert _dtypes(base, None)["adapter_parameters"] == 0
    if arm == "full":
        save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "own" / "own_weights.safetensors")
        code, _, stderr = call(*options, "--adapter", tmp_path / "own")
        assert code == 1
        assert "does not fit this model: model.norm.weight is missing or of another size" in stderr


def test_special_tokens_in_a_text_are_read_as_the_option_says(call, inputs, tmp_path):
    text = tmp_path / "marked.jsonl"
    rows = [json.loads(line) for line in (inputs / "texts.jsonl").open()]
    text.write_text("".join(json.dumps({"text": row["text"].replace(" the ", " <s> ")}) + "\n" for row in rows))
    found = {}
    for split in (False, True):
        options = ["--corpus", text, "--out", tmp_path / f"{split}", "--json"]
        code, stdout, _ = call(*options, *(["--split-special-tokens"] if split else []))
        assert code == 0
        found[split] = json.loads(stdout)
        records = [json.loads(line) for line in (tmp_path / f"{split}/items.jsonl").open()]
        found[split]["tokens"] = sum(record["tokens"] for record in records)
    assert found[True]["tokens"] > found[False]["tokens"]
    assert (found[True]["split_special_tokens"], found[False].get("split_special_tokens")) == (True, None)
    assert list(file_faults(tmp_path / "True/results.json", EvalResults)) == []


def test_mistakes_are_one_line_and_write_nothing(call, inputs, tmp_path):
    broken = tmp_path / "broken"
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(broken)
    weights = load_file(broken / "adapter_model.safetensors")
    weights.pop(min(weights))
    save_file(weights, broken / "adapter_model.safetensors")
    (tmp_path / "there").mkdir()
    tasks = ["--tasks", "lambada_openai"]
    short = tmp_path / "short.txt"
    short.write_text("One document of few words.")
    cases = {
        "nothing to evaluate": [],
        "did you mean": ["--tasks", "lambada_opena"],
        "does not exist": ["--tasks", "wikitext", "--data-dir", tmp_path / "nowhere"],
        "no such folder": [*tasks, "--adapter", tmp_path / "nowhere"],
        "lacks base_model": [*tasks, "--adapter", broken],
        "exists already": [*tasks, "--out", tmp_path / "there"],
        "no folder can be made in .*short.txt: choose another --out": [*tasks, "--out", short / "scores"],
        "at least 2 items": [*tasks, "--limit", "1"],
        "the model reads at most 512": [*tasks, "--context-length", "1000"],
        "stride must lie": ["--corpus", inputs / "texts.jsonl", "--stride", "600"],
        "unknown corpus": ["--corpus", "nothing"],
        "text short is one document, an interval needs 2": ["--corpus", short],
        "is unknown: choose one of auto": [*tasks, "--dtype", "int8"],
        "must be at least 1": [*tasks, "--batch-tokens", "0"],
        "--seed is for --tasks": ["--corpus", inputs / "texts.jsonl", "--seed", "7"],
        "--batch-size is for --tasks": ["--corpus", inputs / "texts.jsonl", "--batch-size", "64"],
        "--stride is for --corpus": [*tasks, "--stride", "64"],
        "--corpus-split is for --corpus": [*tasks, "--corpus-split", "dev"],
        "--num-fewshot is for --tasks": ["--corpus", inputs / "texts.jsonl", "--num-fewshot", "2"],
        "a chat template's marks as text": [*tasks, "--split-special-tokens", "--apply-chat-template"],
    }
    for message, options in cases.items():
        out = [] if "--out" in options else ["--out", tmp_path / "out"]
        code, _, stderr = call(*options, *out)
        assert code == 1, message
        (line,) = [line for line in stderr.splitlines() if line.startswith("error:")]
        assert re.search(message, line), line
        assert not (tmp_path / "out").exists()


def test_scores_that_cannot_be_written_are_still_printed(call, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    # In the middle of the first file, behind the check of the place.
    monkeypatch.setattr(os, "replace", full)
    for options in ([], ["--json"]):
        out = tmp_path / f"full{len(options)}"
        code, stdout, stderr = call("--tasks", "lambada_openai", "--out", out, *options)
        assert code == 1
        assert re.search(r"lambada_openai +acc +\d", stderr)
        assert "records:" not in stderr
        assert stderr.splitlines()[-1].startswith(f"error: no space left on the disk while writing {out}")
        assert not options or json.loads(stdout)["error"].startswith("no space left")


def test_nan_is_a_failure_and_writes_nothing(call, inputs, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "nan" / file).write_bytes((inputs / "model" / file).read_bytes())
    code, _, stderr = call("--tasks", "lambada_openai", "--out", tmp_path / "out", model=tmp_path / "nan")
    assert code == 1
    assert "NaN" in stderr
    assert not (tmp_path / "out").exists()


def test_own_tasks_with_lm_evals_options_and_files(call, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder, out = write_own_tasks(tmp_path / "own"), tmp_path / "out"
    options = ["--tasks", "own_group,own_sums", "--include-path", folder, "--num-fewshot", "2", "--seed", "7"]
    code, stdout, _ = call(*options, "--adapter", inputs / "lora", "--log-samples", "--out", out, "--batch-size", "2")
    assert code == 0
    assert "group own_group" in stdout
    results = json.loads((out / "results.json").read_text())
    assert results["task_settings"] == {"include_path": str(folder), "num_fewshot": 2}
    assert {name: row["lm_eval"]["num_fewshot"] for name, row in results["sets"].items()} == {
        "own_small": 2,
        "own_large": 2,
        "own_sums": 2,
    }
    assert not list(file_faults(out / "results.json", EvalResults))
    names = [str(path) for path in out.rglob("*")]
    (file,) = get_results_filenames([name for name in names if f"{out}/results.json" != name])
    theirs = json.loads(Path(file).read_text())
    assert len(get_sample_results_filenames(names)) == 3
    rows = [json.loads(line) for line in (out / "items.jsonl").read_text().splitlines()]
    accuracies = [row["scores"]["acc"] for row in rows if "acc" in row["scores"]]
    assert theirs["groups"]["own_group"]["acc,none"] == pytest.approx(sum(accuracies) / len(accuracies))
    assert theirs["results"]["own_large"]["acc_stderr,none"] == pytest.approx(
        results["metrics"]["own_large"]["acc"]["value"] ** 0.5
        * (1 - results["metrics"]["own_large"]["acc"]["value"]) ** 0.5
        / 6**0.5
    )
    assert theirs["config"]["fewshot_seed"] == 7
    for wrong, words in (
        (["--log-samples"], "--log-samples needs --tasks, and a folder as --out"),
        (["--seed", "1,2"], "--seed '1,2' is not possible: give one number, or four as in 0,1234,1234,1234"),
        (["--apply-chat-template"], "the tokenizer has no chat template"),
        (["--batch-size", "0"], "0 is not possible: it must be at least 1"),
    ):
        code, _, error = call(*options[:4], *wrong)
        assert code != 0
        assert words in " ".join(error.split())
