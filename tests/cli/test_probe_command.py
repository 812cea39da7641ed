"""`preskip probe` through the real command, on a tiny model in a folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import zoo
from conforming import run_faults
from local_data import write_local_data
from preskip.cli.main import main
from preskip.report import build_report
from tiny_model import save_tiny_llama, write_corpus

FEW = ["--steps", "4", "--batch-size", "2", "--seq-len", "16", "--eval-documents", "4", "--eval-words", "30"]
FEW += ["--last-word-items", "6", "--context-length", "32", "--save-steps", "1", "--device", "cpu"]
FEW += ["--dtype", "float32", "--heldout-fraction", "0.4"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_tiny_llama(folder / "model"), write_corpus(folder / "corpus.jsonl")


@pytest.fixture(autouse=True)
def _no_page(monkeypatch):
    """The page is drawn for `finished`, and by the tests that read one."""
    monkeypatch.setattr("preskip.report.build_report", lambda run: run / "report.html")


@pytest.fixture
def probe(inputs, tmp_path, capsys):
    """Call `preskip probe` with the tiny inputs; returns exit code, stdout and stderr."""
    model, corpus = inputs

    def call(*arguments, model=model, corpus=corpus, out=tmp_path / "run"):
        options = [*FEW, "--corpus", str(corpus), *(["--out", str(out)] if out else []), *map(str, arguments)]
        code = 0
        try:
            main(["probe", str(model), *options])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def items(run, arm, seed=42):
    return [json.loads(line) for line in (run / "arms" / arm / f"seed-{seed}" / "items.jsonl").open()]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """One finished run with two seeds."""
    model, corpus = inputs
    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.raises(SystemExit) as stop:
        main(["probe", str(model), *FEW, "--corpus", str(corpus), "--seeds", "1,2", "--out", str(run), "--json"])
    assert stop.value.code == 0
    return run


def test_a_finished_run_holds_everything(finished):
    run = finished
    manifest = json.loads((run / "run.json").read_text())
    results = json.loads((run / "results.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["model"]["type"] == "llama"
    assert manifest["model"]["dtype"] == "float32"
    assert manifest["environment"]["torch"] == torch.__version__
    assert set(results["arms"]) == {"none", "preskip", "lora"}
    assert results["arms"]["none"]["seeds"] == [1]
    assert results["arms"]["preskip"]["seeds"] == [1, 2]
    assert results["arms"]["preskip"]["trainable_parameters"] == int(3.5 * 32**2) * 2
    counts = [results["arms"][arm]["trainable_parameters"] for arm in ("preskip", "lora")]
    assert abs(counts[0] - counts[1]) <= 0.005 * counts[0]
    assert {(c["arm"], c["reference"], c["declared"]) for c in results["comparisons"]} == {
        ("preskip", "none", True),
        ("lora", "none", False),
        ("preskip", "lora", True),
    } | {("preskip", "none", False), ("preskip", "lora", False)}  # nats of the last words are not declared
    assert {entry["set"] for entry in results["comparisons"]} == {"corpus", "last_word"}
    assert manifest["family"] == results["family"]
    assert results["kv_cache"]["arm_bytes"] == results["kv_cache"]["base_bytes"] == 2 * 2 * 16 * 4
    assert len(results["depth"]["preskip"]["1"]) == 2
    assert (run / "report.html").stat().st_size < 3_000_000
    assert not list(run.glob("arms/*/*/checkpoints"))
    assert run_faults(run) == []


def test_pieces_of_one_text_file_give_no_verdict(probe, inputs, tmp_path):
    """They are not independent: neither as documents nor by their last words."""
    texts = [json.loads(line)["text"] for line in inputs[1].open()]
    novel = tmp_path / "novel.txt"
    novel.write_text("\n\n".join(f"Chapter {number}. {text}" for number in range(400) for text in texts)[:100_000])
    code, _, err = probe("--arms", "none,preskip", corpus=novel)
    assert code == 0, err
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert {results["sets"][name]["clusters"] for name in ("novel", "last_word")} == {1}
    assert {entry["verdict"] for entry in results["comparisons"]} == {"too few units"}


def test_figures_follow_from_the_items(finished):
    import math

    results = json.loads((finished / "results.json").read_text())
    rows = [row for row in items(finished, "none", 1) if row["kind"] == "document"]
    expected = sum(row["nll"] for row in rows) / math.log(2) / sum(row["bytes"] for row in rows)
    assert results["arms"]["none"]["metrics"]["corpus"]["bits_per_byte"]["value"] == pytest.approx(expected)
    words = [row for row in items(finished, "none", 1) if row["set"] == "last_word"]
    accuracy = sum(row["scores"]["acc"] for row in words) / len(words)
    assert results["arms"]["none"]["metrics"]["last_word"]["acc"]["value"] == pytest.approx(accuracy)
    assert results["sets"]["corpus"]["documents"] == len(rows) == 4
    assert results["sets"]["corpus"]["domain"] == "in"
    assert results["sets"]["corpus"]["tokens"] == sum(row["tokens"] for row in rows)
    assert results["sets"]["last_word"]["items"] == len(words) == 6


def test_all_arms_see_the_same_batches(finished):
    """At step 1 no arm has learnt anything and the insertions are identities: the losses are the base's, and equal."""
    for seed in (1, 2):
        first = {}
        for arm in ("preskip", "lora"):
            log = (finished / "arms" / arm / f"seed-{seed}" / "train.jsonl").read_text().splitlines()
            assert len(log) == 4
            first[arm] = json.loads(log[0])["loss"]
        assert first["preskip"] == pytest.approx(first["lora"], abs=1e-6)


def test_a_stored_adapter_gives_the_stored_scores(finished, inputs):
    """Everything needed to evaluate again is in the run directory."""
    from peft import PeftModel

    from preskip.assets import load_model, load_tokenizer
    from preskip.data.corpus import load_corpus
    from preskip.data.splits import choose
    from preskip.evaluate.likelihood import document_windows, score_sequences

    model, corpus = inputs
    base = load_model(str(model), dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, finished / "arms" / "preskip" / "seed-2" / "adapter")
    documents = {document.id: document for document in load_corpus(str(corpus)).documents}
    tokenizer = load_tokenizer(str(model))
    for row in items(finished, "preskip", 2):
        if row["kind"] == "document":
            windows, _ = document_windows(
                choose([documents[row["id"]]], 1, 30, 0), tokenizer, context_length=32, stride=32
            )
            total = sum(score.nll for score in score_sequences(adapted, windows))
            assert total == pytest.approx(row["nll"], rel=1e-5)


def test_ctrl_c_says_how_to_resume(probe, tmp_path, monkeypatch):
    from preskip.train import frozen

    real = frozen._StepLog.on_log

    def interrupt(self, args, state, control, logs=None, **kwargs):
        real(self, args, state, control, logs=logs, **kwargs)
        if self.arm == "lora" and state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(frozen._StepLog, "on_log", interrupt)
    code, _, err = probe()
    run = tmp_path / "run"
    assert code == 130
    assert f"--resume {run}" in err
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    monkeypatch.setattr(frozen._StepLog, "on_log", real)
    with pytest.raises(SystemExit) as stop:
        main(["probe", "--resume", str(run), "--json"])
    assert stop.value.code == 0
    assert items(run, "lora")


def test_a_finished_run_is_not_computed_again(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("arms/*/*/*.json*")}
    with pytest.raises(SystemExit) as stop:
        main(["probe", "--resume", str(finished), "--json"])
    assert stop.value.code == 0
    assert {path: path.stat().st_mtime_ns for path in finished.glob("arms/*/*/*.json*")} == before
    assert json.loads(capsys.readouterr().out)["arms"]["none"]["seeds"] == [1]


def test_every_branch_option_reaches_the_adapter(probe, tmp_path):
    options = ["--arms", "preskip", "--expansion", "0.5", "--activation", "gelu", "--gated", "--dropout", "0.1"]
    options += ["--skip-rank", "4", "--init-weights", "paper", "--init-std", "0.02", "--layers", "1", "--lr", "1e-4"]
    code, _, err = probe(*options)
    assert code == 0, err
    config = json.loads(
        (tmp_path / "run" / "arms" / "preskip" / "seed-42" / "adapter" / "adapter_config.json").read_text()
    )
    expected = {
        "expansion": 0.5,
        "activation": "gelu",
        "gated": True,
        "dropout": 0.1,
        "skip_rank": 4,
        "init_weights": "paper",
        "init_std": 0.02,
        "layers_to_transform": [1],
    }
    assert {key: config[key] for key in expected} == expected
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["arms"]["preskip"]["trainable_parameters"] == 3 * 32 * 16 + 2 * 32 * 4
    assert results["arms"]["preskip"]["learning_rate"] == 1e-4


def test_layers_attention_adapts_exactly_the_attention_layers_of_a_hybrid(probe, inputs, tmp_path):
    sizes = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 256}
    zoo.build("lfm2", **sizes).save_pretrained(tmp_path / "lfm2")
    for file in inputs[0].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "lfm2")
    code, _, err = probe("--arms", "none,preskip,lora", model=tmp_path / "lfm2")
    assert code != 0
    assert "model.layers.0; give --layers 1 or --layers attention to adapt only the others" in err
    arms = ["--arms", "none,preskip,lora-attention", "--match", "none", "--lora-rank", "4"]
    code, _, err = probe(*arms, "--layers", "attention", model=tmp_path / "lfm2")
    assert code == 0, err
    for arm in ("preskip", "lora-attention"):
        tensors = load_file(tmp_path / "run" / "arms" / arm / "seed-42" / "adapter" / "adapter_model.safetensors")
        assert tensors
        assert all(".layers.1.self_attn." in key for key in tensors)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [row["layer"] for row in results["depth"]["preskip"]["42"]] == [1]


def test_target_modules_choose_the_same_layers_for_both_arms(probe, tmp_path):
    code, _, err = probe("--target-modules", r"model\.layers\.1\.self_attn")
    assert code == 0, err
    for arm in ("preskip", "lora"):
        tensors = load_file(tmp_path / "run" / "arms" / arm / "seed-42" / "adapter" / "adapter_model.safetensors")
        assert tensors
        assert all(".layers.1." in key for key in tensors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "none,lorra"], "unknown arm 'lorra'"),
        (["--activation", "tanh"], "activation='tanh'"),
        (["--expansion", "0"], "expansion=0.0"),
        (["--expansion", "nan"], "expansion=nan"),
        (["--layers", "0,7"], "has attention in layers 0 to 1"),
        (["--layers", "x"], "--layers 'x'"),
        (["--target-modules", "["], "is not a regular expression"),
        (["--exclude-modules", ".*"], "is left to adapt"),
        (["--lr", "fast"], "--lr 'fast'"),
        (["--lr", "none=1e-3"], "--lr names 'none'"),
        (["--lr", "dora=1e-3"], "'dora', which is not compared"),
        (["--arms", ""], "--arms needs one or more"),
        (["--arms", "bitfit"], "LlamaForCausalLM has no biases"),
        (["--arms", "full", "--dtype", "float16"], "would train weights in float16"),
        (["--preset", "huge"], "--preset 'huge' is unknown: choose one of quick, standard, confirmatory, paper"),
        (["--match", "size"], "--match 'size'"),
        (["--lora-rank", "few"], "--lora-rank 'few' is not a number"),
        (["--lora-rank", "preskip=4"], "--lora-rank preskip=4"),
        (["--lora-rank", "lora=1.5"], "--lora-rank lora=1.5: give a whole rank, or a share of the width"),
        (["--lora-rank", "inf"], "--lora-rank lora=inf: give a whole rank"),
        (["--lora-scale", "0"], "--lora-scale 0.0 is not possible: it must be a number above 0"),
        (["--lora-scale", "nan"], "--lora-scale nan is not possible"),
        (["--match", "none"], "arm lora: --match none leaves its rank open: give --lora-rank"),
        (["--lr", "tune", "--lr-rule", "frontier"], "--lr-rule frontier needs out-of-domain text to choose on"),
        (["--primary", "preskip:lora:books"], "--primary: 'books' is not compared: choose one of corpus, last_word"),
        (["--tasks", "lambada_openaj"], "lambada_openai"),
        (["--tasks", "own", "--include-path", "nowhere"], "nowhere: no such folder"),
        (
            ["--tasks", "lambada_openai", "--task-limit", "1"],
            "--task-limit 1 is not possible: an interval takes at least 2 items",
        ),
        (["--eval-corpora", "pydoc:1x9"], "is too small"),
        (["--eval-corpora", "nothing"], "unknown corpus 'nothing'"),
        (["--corpus", "books", "--data-dir", "/nowhere"], "folder /nowhere does not exist"),
        (["--ablation-documents", "1"], "--ablation-documents 1"),
        (["--nulls", "silence"], "--nulls 'silence'"),
        (["--packing", "loose"], "--packing 'loose'"),
        (["--steps", "0"], "--steps 0"),
        (["--split-seed", "-1"], "--split-seed -1"),
        (["--eval-documents", "1"], "--eval-documents 1 is not possible: it must be at least 2"),
        (["--eval-batch-tokens", "0"], "--eval-batch-tokens 0"),
        (["--heldout-fraction", "nan"], "--heldout-fraction nan"),
        (["--seeds", "4294967296"], "--seeds 4294967296"),
        (["--micro-batch-size", "0"], "--micro-batch-size 0"),
        (["--seeds", "1,one"], "'one' is not a whole number"),
        (["--seeds", "1,1"], "different numbers"),
        (["--dtype", "int8"], "--dtype 'int8'"),
        (["--device", "tpu"], "--device 'tpu'"),
        (["--micro-batch-size", "3"], "does not divide"),
        (["--batch-size", "5000"], "one batch"),
        (["--context-length", "9999"], "exceed the model's context of 256"),
        (["--no-preprojection", "--no-content-skip"], "content_skip=False"),
        (["--skip-rank", "33"], "skip_rank=33 exceeds the width 32"),
        (["--expansion", "0.01", "--no-content-skip"], "no inner feature"),
    ],
)
def test_bad_options_end_in_one_line_and_leave_nothing(probe, tmp_path, arguments, message):
    import re

    code, out, err = probe(*arguments)
    assert code == 1
    assert re.search(re.escape(message) if "(" not in message else message, err), err
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_bad_models_and_corpora(probe, inputs, tmp_path):
    model, _ = inputs

    def refused(message, **where):
        code, _, err = probe(**where)
        assert code == 1
        assert message in err
        assert "Traceback" not in err
        assert not (tmp_path / "run").exists()

    refused("unknown model", model="nothing-of-that-name")
    (tmp_path / "empty").mkdir()
    refused("config.json", model=tmp_path / "empty")
    refused("HF_HUB_OFFLINE", model="some-org/some-model")
    refused("unknown corpus", corpus="nothing")
    cut = shutil.copytree(model, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused("model.safetensors", model=cut)
    pickled = shutil.copytree(model, tmp_path / "pickled")
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    refused("safetensors", model=pickled)
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"text": "One document alone."}) + "\n")
    refused("one to hold out", corpus=one)


def test_corpora_that_cannot_give_an_interval_are_refused_before_training(probe, tmp_path):
    def refused(text, message, *arguments):
        corpus = tmp_path / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": f"{text} {index}"}) + "\n" for index in range(8)))
        code, _, err = probe(*arguments, corpus=corpus)
        assert code == 1
        assert message in err
        assert not (tmp_path / "run").exists()

    refused("Words without an end " * 40, "leave out last-word accuracy (--last-word-items 0)")
    refused("Words without an end " * 40, "1 held-out document", "--heldout-fraction", "0.01")


def test_a_masked_language_model_is_refused(probe, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    from tiny_text import tiny_tokenizer

    settings = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(**settings, intermediate_size=64)).save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    code, _, err = probe(model=tmp_path / "bert")
    assert code == 1
    assert err.count("error:") == 1
    assert "sees later tokens" in err


def test_a_short_absolute_context_is_used_to_its_end(probe, tmp_path):
    """GPT-2's position table ends at 32 tokens: windows fill it, longer items are left out."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from tiny_text import tiny_tokenizer

    GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=4, n_positions=32)).save_pretrained(
        tmp_path / "gpt2"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    code, _, err = probe(model=tmp_path / "gpt2")
    assert code == 0, err
    assert "last words are not scored" in err
    assert "exceed the context of 32" in err
    assert len(items(tmp_path / "run", "none")) == 4


def test_what_was_asked_and_repeated_passes_are_said(probe, tmp_path):
    code, _, err = probe("--arms", "none", "--steps", "400")
    assert code == 0
    assert "base weights float32 (as asked)" in err
    corpus = json.loads((tmp_path / "run" / "run.json").read_text())["corpus"]
    assert corpus["training_passes"] == round(400 * 2 * 16 / corpus["training_tokens"], 2) > 1
    assert f"each seen {corpus['training_passes']:g} times" in err


def test_errors_are_one_json_document_with_json(probe):
    code, out, err = probe("--json", "--steps", "0")
    assert code == 1
    assert "--steps 0" in json.loads(out)["error"]
    assert err.count("error:") == 1


def test_resume_refuses_a_changed_corpus_and_a_damaged_cell(inputs, finished, tmp_path, capsys):
    def resume(run):
        with pytest.raises(SystemExit) as stop:
            main(["probe", "--resume", str(run)])
        return stop.value.code, capsys.readouterr().err

    run = shutil.copytree(finished, tmp_path / "damaged")
    (run / "arms" / "lora" / "seed-1" / "items.jsonl").write_text("{")
    code, err = resume(run)
    assert code == 1
    assert f"delete {run}/arms/lora/seed-1" in " ".join(err.split())
    manifest = json.loads((run / "run.json").read_text())
    manifest["config"]["corpus"] = str(write_corpus(tmp_path / "other.jsonl", documents=11))
    (run / "run.json").write_text(json.dumps(manifest))
    code, err = resume(run)
    assert code == 1
    assert "has changed since this run began" in err


def test_resume_refuses_a_changed_tokenizer(inputs, finished, tmp_path, capsys):
    model, corpus = inputs
    run, other = shutil.copytree(finished, tmp_path / "run"), shutil.copytree(model, tmp_path / "model")
    manifest = json.loads((run / "run.json").read_text())
    manifest["config"] |= {"model": str(other), "corpus": str(corpus)}
    (run / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit) as stop:
        main(["probe", "--resume", str(run)])
    assert stop.value.code == 0
    settings = json.loads((other / "tokenizer_config.json").read_text())
    end = AutoTokenizer.from_pretrained(other).convert_ids_to_tokens(3)
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": end}))
    with pytest.raises(SystemExit):
        main(["probe", "--resume", str(run)])
    assert "tokenizer local folder" in (err := " ".join(capsys.readouterr().err.split()))
    assert "has changed since this run began" in err


def test_nan_weights_are_found_before_training(probe, inputs, tmp_path):
    model, _ = inputs
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    code, _, err = probe(model=broken)
    assert code == 1
    assert "NaN" in err
    assert not list(tmp_path.glob("run/arms/*/*/train.jsonl"))


def test_out_must_be_new_and_writable(probe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("keep")
    code, _, err = probe()
    assert code == 1
    assert "exists already" in err
    assert (tmp_path / "run" / "mine").read_text() == "keep"
    code, _, err = probe(out=tmp_path / "run" / "mine" / "deeper")
    assert code == 1
    assert "no folder can be made in" in err
    code, _, err = probe(out=Path("/proc/preskip"))
    assert code == 1
    assert err.count("error:") == 1


def test_a_run_moved_elsewhere_resumes_from_any_folder(inputs, tmp_path, monkeypatch, capsys):
    """Relative paths of model and corpus mean the folder in which the run was started."""
    model, corpus = inputs
    monkeypatch.chdir(model.parent)
    out = tmp_path / "with space"
    with pytest.raises(SystemExit):
        main(["probe", model.name, "--corpus", corpus.name, *FEW, "--arms", "none", "--out", str(out), "--json"])
    moved = tmp_path / "moved" / "run"
    moved.parent.mkdir()
    out.rename(moved)
    (moved / "arms" / "none" / "seed-42" / "cell.json").unlink()
    manifest = json.loads((moved / "run.json").read_text())
    manifest["family"]["margins"]["bits_per_byte"] = 0.123  # as another version declared it
    (moved / "run.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(moved.parent)
    with pytest.raises(SystemExit) as stop:
        main(["probe", "--resume", "run", "--json"])
    assert stop.value.code == 0
    resumed = json.loads((moved / "run.json").read_text())
    assert resumed["corpus"]["name"] == corpus.name
    assert resumed["family"] == manifest["family"] == json.loads((moved / "results.json").read_text())["family"]


def test_resume_refuses(probe, tmp_path, finished):
    def resume(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["probe", *map(str, arguments)])
        return stop.value.code

    assert resume("--resume", tmp_path / "nowhere") == 1
    assert resume("--resume", finished, "--steps", "9") == 1


def test_full_disk_while_saving_is_one_line_and_resumable(probe, tmp_path, monkeypatch):
    import errno

    import peft

    real = peft.PeftModel.save_pretrained

    def full(self, folder, *args, **kwargs):
        if "adapter" in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, folder, *args, **kwargs)

    monkeypatch.setattr(peft.PeftModel, "save_pretrained", full)
    code, _, err = probe()
    assert code == 1
    assert "no space left" in err
    assert "--resume" in err
    monkeypatch.setattr(peft.PeftModel, "save_pretrained", real)
    with pytest.raises(SystemExit) as stop:
        main(["probe", "--resume", str(tmp_path / "run"), "--json"])
    assert stop.value.code == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


def test_text_mode_prints_the_table(probe):
    code, out, err = probe("--arms", "preskip")
    assert code == 0
    assert "preskip − none" in out
    assert "report:" in out
    assert "inserted weights float32" in err


def test_tuned_rates_abroad_texts_and_arms_without_adapter(probe, inputs, tmp_path):
    """`--lr tune` of one arm of several, resumed from its stored trials; a second corpus that no arm trains on."""
    corpus, abroad = write_corpus(tmp_path / "home.jsonl", 40), write_corpus(tmp_path / "abroad.jsonl", 40)
    options = ["--arms", "preskip,layernorm,full", "--lr", "tune", "--lr", "full=1e-3", "--lr", "layernorm=2e-3"]
    options += ["--seeds", "1,2"]
    options += ["--eval-corpora", f"{abroad}:4x20", "--development-documents", "3", "--development-words", "20"]
    options += ["--steps", "8", "--last-word-items", "0"]
    code, _, err = probe(*options, corpus=corpus)
    assert code == 0, err
    run = tmp_path / "run"
    results = json.loads((run / "results.json").read_text())
    assert set(results["sets"]) == {"home", "abroad"}
    assert [described["domain"] for described in results["sets"].values()] == ["in", "out"]
    assert results["sets"]["abroad"]["documents"] == 4
    assert set(results["search"]) == {"preskip"}
    assert [results["arms"][arm]["learning_rate"] for arm in ("full", "layernorm")] == [1e-3, 2e-3]
    assert results["arms"]["full"]["budget"] == "ceiling"
    for arm, found in results["search"].items():
        assert results["arms"][arm]["learning_rate"] == found["chosen"] == found["by_seed"]["1"]
        last = [entry for entry in found["trace"] if entry["rung"] == 1 and not entry["diverged"]]
        for seed in (1, 2):
            own = [entry for entry in last if entry["for_seed"] == seed]
            best = min(own, key=lambda entry: entry["dev"]["in"]["value"])
            assert best["learning_rate"] == found["by_seed"][str(seed)]
            assert best["kept"]
        assert {entry["steps"] for entry in found["trace"]} == {2, 4}
        assert all(set(entry["dev"]["out"]) == {"abroad"} for entry in last)
    assert not list(run.glob("search/*/*/*/*/checkpoints"))
    trial = next(run.glob("search/preskip/seed-2/rung-1/*/trial.json"))
    before = {path: path.stat().st_mtime_ns for path in run.glob("search/*/*/*/*/trial.json") if path != trial}
    trial.unlink()
    (run / "search" / "preskip" / "seed-2" / "search.json").unlink()
    with pytest.raises(SystemExit) as stop:
        main(["probe", "--resume", str(run), "--json"])
    assert stop.value.code == 0
    assert json.loads((run / "results.json").read_text())["search"] == results["search"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_presets_are_what_options_override(probe, monkeypatch, tmp_path):
    from preskip.experiment.presets import PRESETS, Preset

    monkeypatch.setitem(PRESETS, "quick", Preset(description="", options={"arms": "preproj", "steps": 2, "seeds": "7"}))
    code, _, err = probe()
    assert code == 0, err
    config = json.loads((tmp_path / "run" / "run.json").read_text())["config"]
    assert config["arms"] == ["none", "preproj"]
    assert config["seeds"] == [7]
    assert config["steps"] == 4, "given on the command line"


def test_the_dtype_audit_scores_the_untouched_base_on_the_same_items(probe, tmp_path):
    code, out, err = probe("--dtype-audit", "--arms", "none,skip", "--seeds", "1")
    assert code == 0, err
    assert "autocast" in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    audit = results["dtype_audit"]
    assert list(audit["dtypes"]) == ["float32", "autocast", "bfloat16"]
    assert {label for label, facts in audit["dtypes"].items() if "seconds" in facts} == {"autocast", "bfloat16"}
    assert "score in float32" not in err  # arm none has been scored so
    own = results["arms"]["none"]["metrics"]["corpus"]["bits_per_byte"]["value"]
    assert audit["dtypes"]["float32"]["metrics"]["corpus"]["bits_per_byte"]["value"] == pytest.approx(own, abs=1e-9)
    cost = next(row for row in audit["comparisons"] if row["arm"] == "bfloat16" and row["metric"] == "bits_per_byte")
    other = audit["dtypes"]["bfloat16"]["metrics"]["corpus"]["bits_per_byte"]["value"]
    assert cost["difference"] == pytest.approx(other - own, abs=1e-9)
    assert cost["difference"] != 0
    page = build_report(tmp_path / "run").read_text()
    assert f"bf16 weights {cost['difference']:+.4f}" in page
    assert run_faults(tmp_path / "run") == []


def test_nulls_and_equal_steps_are_stored(probe, tmp_path):
    code, _, err = probe(
        "--arms",
        "preskip,skip,lora",
        "--nulls",
        "noise,shuffled",
        "--equal-step",
        "--seeds",
        "1,2",
        "--ablation-documents",
        "3",
    )
    assert code == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    nulls = results["nulls"]
    assert {arm: [entry["seed"] for entry in entries] for arm, entries in nulls["noise"].items()} == {
        "preskip": [1, 2],
        "skip": [1, 2],
    }
    assert list(nulls["shuffled"]) == ["preskip"]
    for entries in (*nulls["noise"].values(), *nulls["shuffled"].values()):
        assert all(len(entry["layers"]) == 2 for entry in entries)
        assert all(row["skip_norm"] > 0 for entry in entries for row in entry["layers"])
    assert all(row["up_norm"] == 0 for row in nulls["noise"]["skip"][0]["layers"])
    assert len(results["equal_step"]["preskip"]["1"]) == 2
    logs = {path.parent.parent.parent.name: path.read_text() for path in (tmp_path / "run").glob("*/*/*/*/train.jsonl")}
    assert {name: "step_ratio" in log for name, log in logs.items()} == {
        "noise": False,
        "shuffled": False,
        "equal_step": True,
    }
    assert not any("step_ratio" in path.read_text() for path in (tmp_path / "run").glob("arms/*/*/train.jsonl"))
    assert {(row["layer"], row["part"]) for row in results["ablation"]["preskip"]["2"]} == {
        (layer, part) for layer in (0, 1) for part in ("skip", "enrichment")
    }
    assert {row["part"] for row in results["ablation"]["skip"]["1"]} == {"skip"}
    assert "lora" not in results["ablation"]
    assert run_faults(tmp_path / "run") == []
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "controls").rglob("cell.json")}
    assert len(before) == 4 + 1 + 1
    with pytest.raises(SystemExit) as stop:
        main(["probe", "--resume", str(tmp_path / "run"), "--json"])
    assert stop.value.code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_rate_at_which_training_diverges_is_passed_over(probe, tmp_path, monkeypatch):
    """The largest rate of the grid gives a NaN; another error would end the search."""
    from preskip.errors import DivergedError
    from preskip.experiment.frozen import Frozen

    real = Frozen.fit

    def fit(prepared, model, settings, **where):
        if settings["learning_rate"] > 1e-3:
            raise DivergedError("the loss is nan")
        return real(prepared, model, settings, **where)

    monkeypatch.setattr(Frozen, "fit", fit)
    corpus = write_corpus(tmp_path / "home.jsonl", 40)
    options = ["--arms", "preskip", "--lr", "tune", "--development-documents", "3", "--steps", "8"]
    code, _, err = probe(*options, "--last-word-items", "0", corpus=corpus)
    assert code == 0, err
    found = json.loads((tmp_path / "run" / "results.json").read_text())["search"]["preskip"]
    assert found["chosen"] <= 1e-3
    assert {entry["diverged"] for entry in found["trace"] if entry["learning_rate"] > 1e-3} == {True}
    assert run_faults(tmp_path / "run") == []
    assert build_report(tmp_path / "run").is_file()


@pytest.mark.parametrize(("name", "domain"), [("corpus", "out"), ("my-wikitext", "in")])
def test_the_papers_scoring_is_kept_out_of_the_family(probe, tmp_path, name, domain):
    corpus = write_corpus(tmp_path / f"{name}.jsonl", 40)
    data = write_local_data(tmp_path / "data")
    lines = "".join(f" The committee met for the {i}th time and wrote down what it had found . \n" for i in range(6))
    (data / "wikitext2/wiki.valid.tokens").write_text(" \n = A page = \n \n" + lines)
    options = ["--arms", "preskip", "--paper-scoring", "--packing", "paragraphs", "--data-dir", data]
    code, out, err = probe(*options, "--last-word-items", "0", corpus=corpus)
    assert code == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["sets"]["paper:wikitext"]["domain"] == domain
    assert {"paper:lambada", "paper:hellaswag", "paper:arc_easy", "paper:wikitext"} < set(results["sets"])
    assert {entry["set"] for entry in results["family"]["declared"]} == {name}
    assert set(results["paper"]["columns"]) == {"none", "preskip"}
    assert run_faults(tmp_path / "run") == []
    assert results["paper"]["published"] is None
    assert "the paper's scoring" in out
