"""The dtype audit: the three passes are what they say, paired, and held against published figures."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from commands import preskip
from local_data import SENTENCES, write_local_data
from preskip.assets import load_model, load_tokenizer
from preskip.cli.audit import _published_lines
from preskip.cli.main import main
from preskip.data.corpus import Document
from preskip.errors import PreskipError
from preskip.evaluate import dtype_audit as module
from preskip.evaluate.dtype_audit import dtype_audit
from preskip.evaluate.published import Published
from preskip.evaluate.tasks import TaskSuite
from preskip.evaluate.texts import prepare_texts
from tiny_model import save_tiny_llama, write_corpus

DOCUMENTS = [Document(f"d{i}", " ".join(SENTENCES[i:]), f"{i}") for i in range(4)]


def prose(tokenizer):
    return prepare_texts("prose", DOCUMENTS, tokenizer, context_length=64)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model with weights large enough for bf16 to show, its tokenizer, and local LAMBADA items."""
    folder = tmp_path_factory.mktemp("audit")
    save_tiny_llama(folder / "pythia-160m", initializer_range=0.3)
    write_local_data(folder / "data")
    write_corpus(folder / "texts.jsonl", 12)
    return folder


@pytest.fixture(scope="module")
def audited(inputs):
    name = str(inputs / "pythia-160m")
    tokenizer = load_tokenizer(name)
    suite = TaskSuite(["lambada_openai"], tokenizer, data_dir=inputs / "data", context_length=128)
    return dtype_audit(name, tokenizer, texts=[prose(tokenizer)], suite=suite)


def nats(model, tokenizer, document, context):
    """Nats of a document, each token read behind as many others as fit; later windows end where the next would."""
    ids = [tokenizer.bos_token_id, *tokenizer(document.text, add_special_tokens=False)["input_ids"]]
    total = 0.0
    for first in range(1, len(ids), context):
        end = min(first + context, len(ids))
        part = ids[max(0, end - context - 1) : end]
        with torch.inference_mode():
            logs = model(torch.tensor([part[:-1]])).logits[0].float().log_softmax(-1)
        new = torch.tensor(part[first - end :])
        total -= logs[first - end :].gather(1, new[:, None]).double().sum().item()
    return total


def test_each_pass_is_the_model_in_that_dtype(audited, inputs):
    name = str(inputs / "pythia-160m")
    tokenizer = load_tokenizer(name)
    exact, rounded = load_model(name, torch.float32), load_model(name, torch.bfloat16)
    for document in DOCUMENTS:
        found = {
            label: next(row["nll"] for row in rows if row["id"] == document.id)
            for label, rows in audited.records.items()
        }
        assert found["float32"] == pytest.approx(nats(exact, tokenizer, document, 64), rel=1e-5)
        assert found["bfloat16"] == pytest.approx(nats(rounded, tokenizer, document, 64), rel=2e-3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert found["autocast"] == pytest.approx(nats(exact, tokenizer, document, 64), rel=2e-3)
        assert len({round(value, 5) for value in found.values()}) == 3  # nor is one the other


def test_costs_are_paired_differences_to_fp32(audited):
    report = audited.report
    assert list(report["dtypes"]) == ["float32", "autocast", "bfloat16"]
    assert [run["weights"] for run in report["dtypes"].values()] == ["float32", "float32", "bfloat16"]
    assert [run["computes"] for run in report["dtypes"].values()] == ["float32", "bfloat16", "bfloat16"]
    costs = {(entry["arm"], entry["set"], entry["metric"]): entry for entry in report["comparisons"]}
    assert {key[0] for key in costs} == {"autocast", "bfloat16"}
    for arm in ("autocast", "bfloat16"):
        rows, reference = audited.records[arm], audited.records["float32"]
        texts = [(a["nll"] - b["nll"], b["bytes"]) for a, b in zip(rows, reference, strict=True) if a["set"] == "prose"]
        entry = costs[arm, "prose", "bits_per_byte"]
        expected = sum(nll for nll, _ in texts) / math.log(2) / sum(size for _, size in texts)
        assert entry["difference"] == pytest.approx(expected)
        assert entry["low"] <= entry["difference"] <= entry["high"]
        assert entry["verdict"] in ("better", "worse", "equivalent", "undecided", "too few units")
        assert (arm, "lambada_openai", "acc") in costs


def test_share_of_weights_that_bf16_cannot_hold(audited, inputs):
    model = load_model(str(inputs / "pythia-160m"), torch.float32)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    # bf16 keeps 16 of 32 bits, so it holds a number exactly when the lower 16 are zero.
    inexact = (weights.view(torch.int32) & 0xFFFF != 0).float().mean().item()
    assert audited.report["weights_rounded"] == pytest.approx(inexact)
    assert 0.5 < inexact < 1  # the norms' ones are exact


def test_a_published_model_is_recognised_and_its_distance_given(audited):
    published = audited.report["published"]
    assert published["model"] == "pythia-160m"
    for label, rows in audited.records.items():
        items = [row["scores"] for row in rows if row["set"] == "lambada_openai"]
        found = published["distances"][label]["lambada_openai"]
        assert found["acc"]["items"] == len(items) == len(SENTENCES)
        assert found["acc"]["difference"] == pytest.approx(
            sum(s["acc"] for s in items) / len(items) - 0.32835, abs=1e-5
        )
        mean = sum(s["nll"] for s in items) / len(items)
        assert found["ppl"]["ratio"] == pytest.approx(math.exp(mean) / 38.064877)
    assert any("published 0.3284" in line and "does not agree" in line for line in _published_lines(published))


def test_figures_of_other_tasks_need_no_perplexity(monkeypatch):
    figures = Published(model="x", checkpoint="c", source="s", tasks={"piqa": {"acc": 0.5, "acc_norm": 0.75}})
    monkeypatch.setattr(module, "published_figures", lambda name: figures)
    rows = [{"set": "piqa", "kind": "item", "scores": {"acc": float(i < 3), "acc_norm": 1.0}} for i in range(4)]
    found = module._published("x", {"float32": rows})["distances"]["float32"]["piqa"]
    assert (found["acc"]["difference"], found["acc_norm"]["difference"]) == (0.25, 0.25)


def test_items_that_failed_are_left_out_of_the_distance(monkeypatch):
    figures = Published(model="x", checkpoint="c", source="s", tasks={"lambada_openai": {"acc": 0.5, "ppl": 10.0}})
    monkeypatch.setattr(module, "published_figures", lambda name: figures)
    head = {"set": "lambada_openai", "kind": "item"}
    rows = [{**head, "scores": {"acc": float(i < 3), "nll": 2.0 + i}} for i in range(4)]
    failed = {**head, "scores": {}, "failed": "its log-likelihood is NaN"}
    records = {"float32": rows, "bfloat16": [failed, *rows], "autocast": [failed]}
    found = module._published("x", records)["distances"]
    assert found["float32"]["lambada_openai"]["acc"]["difference"] == 0.25
    assert found["float32"]["lambada_openai"]["ppl"]["ratio"] == pytest.approx(math.exp(3.5) / 10)
    assert found["bfloat16"] == found["float32"]
    assert "autocast" not in found


def test_nothing_to_score_or_to_compare_with_is_one_line(inputs):
    name = str(inputs / "pythia-160m")
    with pytest.raises(PreskipError, match="nothing to audit"):
        dtype_audit(name, load_tokenizer(name))
    with pytest.raises(PreskipError, match="no published figures of 'pythia-999'"):
        dtype_audit(name, load_tokenizer(name), texts=[prose(load_tokenizer(name))], published="pythia-999")


@pytest.fixture
def call(inputs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments):
        fixed = [str(inputs / "pythia-160m"), "--data-dir", str(inputs / "data"), "--device", "cpu"]
        with pytest.raises(SystemExit) as stop:
            main(["audit", *fixed, *map(str, arguments)])
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return run


def test_command_prints_json_or_a_table(call, inputs):
    sizes = ["--lambada", 6, "--documents", 3, "--words", 30, "--corpus", inputs / "texts.jsonl"]
    code, out, err = call(*sizes, "--context-length", 64, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert set(report["dtypes"]["float32"]["metrics"]) == {"texts", "lambada_openai"}
    assert report["published"]["distances"]["bfloat16"]["lambada_openai"]["acc"]["items"] == 6
    code, out, err = call("--lambada", 0, "--documents", 3, "--words", 30, "--corpus", inputs / "texts.jsonl")
    assert code == 0, err
    assert "of the weights change when rounded to bf16" in out
    assert "lambada_openai acc" not in out


def test_no_context_is_longer_than_the_models_own(tmp_path, capsys, inputs):
    """A model with learned positions fails beyond them."""
    config = GPT2Config(vocab_size=400, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    load_tokenizer(str(inputs / "pythia-160m")).save_pretrained(tmp_path / "gpt2")
    call = ["audit", tmp_path / "gpt2", "--lambada", 0, "--documents", 3, "--words", 60, "--device", "cpu"]
    call += ["--corpus", inputs / "texts.jsonl", "--json"]
    assert preskip(*call) == 0
    assert json.loads(capsys.readouterr().out)["context_length"] == 32
    assert preskip(*call, "--context-length", 33) == 1
    assert "error: --context-length 33: the model reads at most 32" in capsys.readouterr().err


def test_a_device_without_bf16_is_warned_of(call, inputs, monkeypatch):
    monkeypatch.setattr("preskip.runs.environment.computes_in_bfloat16", lambda device: False)
    _, _, err = call("--lambada", 0, "--documents", 2, "--words", 10, "--corpus", inputs / "texts.jsonl")
    assert "no bfloat16 instructions" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lambada", 0, "--documents", 0], "nothing to audit"),
        (["--lambada", 1], "--lambada 1 is not possible: it must be at least 2"),
        (["--words", 0], "--words 0 is not possible"),
        (["--published", "gpt2", "--lambada", 0, "--corpus", "pydoc"], "no published figures of 'gpt2'"),
    ],
)
def test_bad_options_are_one_line(call, options, message):
    code, _, err = call(*options)
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert message in line
