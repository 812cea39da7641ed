"""`preskip explain` through the real command: a run, an adapter, a baked checkpoint, figures, and what it refuses."""

import json
import shutil
import sys
import xml.etree.ElementTree as ElementTree

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from commands import make_run, preskip
from conforming import run_faults
from tiny_model import write_corpus
from tiny_text import tiny_tokenizer

FEWEST = ["--words", "40", "--documents", "4", "--device", "cpu"]
FEWEST += ["--attention-documents", "2"]
FEW = [*FEWEST, "--ablation-documents", "2", "--ablation-words", "10", "--context-length", "32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("place"), "--seeds", "2,1", "--nulls", "noise")


@pytest.fixture(scope="module")
def explained(place):
    (place / "note.txt").write_text("NATO met 12 ships in the harbor.", encoding="utf-8")
    texts = ["--text", place / "note.txt", "--text", "a plain <b>text</b>"]
    assert preskip("explain", place / "run", *FEW, *texts, "--figures", place / "figures") == 0
    return json.loads((place / "run" / "explain" / "preskip-seed-2" / "explain.json").read_text())


@pytest.mark.parametrize("split", [False, True])
def test_special_tokens_in_a_text_are_read_as_in_the_run(place, tmp_path, split):
    run = shutil.copytree(place / "run", tmp_path / "run", ignore=shutil.ignore_patterns("explain"))
    manifest = json.loads((run / "run.json").read_text())
    manifest["config"]["split_special_tokens"] = split
    manifest["directory"] = str(place)
    (run / "run.json").write_text(json.dumps(manifest))
    assert preskip("explain", run, *FEW, "--text", "ships in <s> the harbor", "--out", tmp_path / "out") == 0
    tokens = pq.read_table(tmp_path / "out" / "tokens.parquet").to_pylist()
    assert any(row["token"] == "<s>" for row in tokens) is not split


def test_a_run_with_its_reference_arm_and_first_seed(place, explained):
    folder = place / "run" / "explain" / "preskip-seed-2"
    assert {path.name for path in folder.iterdir()} == {"explain.json", "tokens.parquet", "explain.html"}
    page = (folder / "explain.html").read_text(encoding="utf-8")
    assert "a plain <b>text</b>" not in page
    assert (explained["schema_version"], explained["kind"]) == (1, "explain")
    assert explained["source"] == {"kind": "run", "name": "run", "arm": "preskip", "seed": 2}
    assert explained["model"]["dtype"] == "float32"
    assert explained["settings"]["expansion"] == 1.25
    held_out = [text["id"] for text in explained["texts"] if text["set"] == "held-out"]
    assert [text["title"] for text in explained["texts"][:2]] == ["note.txt", "“a plain <b>text</b>”"]
    items = (place / "run" / "arms" / "preskip" / "seed-2" / "items.jsonl").read_text().splitlines()
    assert sorted(held_out) == sorted({json.loads(line)["id"] for line in items})
    rows = pq.read_table(folder / "tokens.parquet")
    assert rows.num_rows == sum(text["tokens"] for text in explained["texts"])
    assert {text["id"] for text in explained["texts"]} == set(rows["document"].to_pylist())
    assert run_faults(place / "run") == []


def test_norms_are_the_runs_and_the_null_is_its_band(place, explained):
    results = json.loads((place / "run" / "results.json").read_text())
    null = [row["skip_norm"] for seed in results["nulls"]["noise"]["preskip"] for row in seed["layers"]]
    for row, stored in zip(explained["layers"], results["depth"]["preskip"]["2"], strict=True):
        for norm in ("layer", "up_norm", "down_norm", "skip_norm"):
            assert row[norm] == pytest.approx(stored[norm], rel=1e-5)
        band = row["null"]["skip_norm"]
        assert min(null) <= band["low"] <= band["high"] <= max(null)


def test_figures_are_drawn_from_the_json_alone_and_the_same_each_time(place, explained, tmp_path):
    from preskip.report.explain.pictures import save_figures

    names = {
        f"{name}.{kind}" for name in ("depth", "ablation", "classes", "spectrum") for kind in ("svg", "pdf", "png")
    }
    assert {path.name for path in (place / "figures").iterdir()} == names
    for path in save_figures(explained, tmp_path):
        content = path.read_bytes()
        if path.suffix == ".pdf":
            table = int(content.split()[-2])
            assert (content[:5], content[table : table + 4], content[-5:]) == (b"%PDF-", b"xref", b"%%EOF")
        else:
            assert content == (place / "figures" / path.name).read_bytes(), path.name
        if path.suffix == ".svg":
            ElementTree.parse(path)
    bare = {**explained, "classes": []}
    bare["layers"] = [
        {**row, "skip_to_attention": None, "skip_norm": None, "spectrum": None, "ablation": None}
        for row in explained["layers"]
    ]
    assert {path.name for path in save_figures(bare, tmp_path / "bare")} == {"depth.svg", "depth.pdf", "depth.png"}


def test_adapter_and_baked_checkpoint_say_what_the_run_says(place, explained, tmp_path, capsys):
    adapter = place / "run" / "arms" / "preskip" / "seed-2" / "adapter"
    assert preskip("bake", adapter, tmp_path / "baked", "--json") == 0
    same = [*FEW, "--corpus", place / "corpus.jsonl", "--json"]
    capsys.readouterr()
    assert preskip("explain", adapter, *same, "--out", tmp_path / "a") == 0
    ours = json.loads(capsys.readouterr().out)
    for row, expected in zip(ours["layers"], explained["layers"], strict=True):
        assert {**row, "null": None} == {**expected, "null": None}
    assert ours["source"] == {"kind": "adapter", "name": "run", "arm": "preskip", "seed": 2}
    # Elsewhere, a corpus is read as a whole: no one knows what was held out of it.
    shutil.copytree(adapter, tmp_path / "lone")
    lone = [*same, "--model", place / "model", "--dtype", "float32", "--out", tmp_path / "l"]
    assert preskip("explain", tmp_path / "lone", *lone) == 0
    found = json.loads(capsys.readouterr().out)
    assert preskip("explain", tmp_path / "baked", *same, "--dtype", "float32", "--out", tmp_path / "b") == 0
    baked = json.loads(capsys.readouterr().out)
    assert baked["layers"] == found["layers"]
    assert baked["source"] == {"kind": "baked", "name": "baked", "arm": None, "seed": None}
    assert baked["model"]["type"] == "preskip_llama"
    assert baked["layers"][0]["skip_norm"] == explained["layers"][0]["skip_norm"]


def test_another_seed_and_no_ablation(place, explained, tmp_path, capsys):
    chosen = ["--arm", "preskip", "--seed", "1", "--out", tmp_path / "one", "--ablation-documents", "0", "--json"]
    assert preskip("explain", place / "run", *FEWEST, *chosen, "--ablation-words", "30") == 1
    assert "--ablation-words is for --ablation-documents: give that, too" in capsys.readouterr().err
    assert preskip("explain", place / "run", *FEWEST, *chosen) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["source"]["seed"] == 1
    assert other["layers"][0]["ablation"] is None
    assert other["layers"][0]["skip_norm"] != explained["layers"][0]["skip_norm"]


def test_without_the_report_extra_what_was_measured_is_kept(place, explained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    out = tmp_path / "bare"
    assert preskip("explain", place / "run", *FEW, "--out", out) == 0
    printed = capsys.readouterr()
    assert [path.name for path in out.iterdir() if path.suffix != ".parquet"] == ["explain.json"]
    assert "no explain.html: the report needs altair, which is not installed" in printed.err
    assert str(out) in printed.out.replace("\n", "")
    assert preskip("explain", place / "run", *FEW, "--out", tmp_path / "figures", "--figures", tmp_path) == 1
    assert not (tmp_path / "figures").exists()


def test_stacked_adapters_of_an_arm(tmp_path, capsys):
    """The other adapter stays on: sizes against hooks on the stacked model itself, ablation by switching the branch."""
    place = make_run(tmp_path, "--arms", "none,preproj+lora,lora", "--seeds", "1")
    run = place / "run"
    for path in run.glob("arms/*/seed-1/adapter/**/adapter_model.safetensors"):  # three steps leave next to nothing
        generator = torch.Generator().manual_seed(len(str(path)))
        tensors = {key: 0.2 * torch.randn(t.shape, generator=generator) for key, t in sorted(load_file(path).items())}
        save_file(tensors, path)
    capsys.readouterr()
    assert preskip("explain", run, "--arm", "preproj+lora", *FEW) == 0
    assert "LORA stays on beside the branch" in capsys.readouterr().err
    found = json.loads((run / "explain" / "preproj+lora-seed-1" / "explain.json").read_text())
    assert found["source"] == {"kind": "run", "name": "run", "arm": "preproj+lora", "seed": 1}
    adapter = run / "arms" / "preproj+lora" / "seed-1" / "adapter"
    assert preskip("explain", adapter, *FEW, "--json", "--out", tmp_path / "a") == 0
    assert json.loads(capsys.readouterr().out)["layers"] == found["layers"]
    base = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    for number in ("1", "2"):
        stacked = PeftModel.from_pretrained(base, adapter / number).eval()
    rows = pq.read_table(run / "explain" / "preproj+lora-seed-1" / "tokens.parquet").to_pylist()
    document = [row for row in rows if row["document"] == rows[0]["document"]][:31]
    ids = torch.tensor([[0, *(row["token_id"] for row in document)]])
    assert AutoTokenizer.from_pretrained(place / "model").bos_token_id == 0
    for index, layer in enumerate(base.model.layers):
        seen: list[torch.Tensor] = []
        handle = layer.input_layernorm.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out[0]))
        with torch.no_grad():
            logits = stacked(input_ids=ids).logits[0]
            weights = layer.self_attn.preskip.linears("default")
            change = weights["down"](torch.nn.functional.silu(weights["up"](seen[0])))
        handle.remove()
        ratio = (change.norm(dim=-1) / seen[0].norm(dim=-1))[1:]
        assert [row["enrichment"][index] for row in document] == pytest.approx(ratio.tolist(), rel=1e-4)
    nats = -logits[:-1].log_softmax(-1)[range(31), ids[0, 1:]]
    assert [row["nll"] for row in document] == pytest.approx(nats.tolist(), rel=1e-4)
    assert all(row["skip_to_attention"] is None and row["skip_norm"] is None for row in found["layers"])
    assert all(row["ablation"]["enrichment"]["value"] != 0 for row in found["layers"])
    assert preskip("explain", run, "--arm", "lora", *FEW) == 1
    assert capsys.readouterr().err.strip().endswith("has no branch: choose one of preproj+lora")


def test_a_run_from_scratch(tmp_path, capsys):
    """The layout of `preskip pretrain`: a model per cell, held-out documents in the run."""
    run = tmp_path / "run"
    corpus = [json.loads(line) for line in write_corpus(tmp_path / "c.jsonl", 4).read_text().splitlines()]
    config = {"arch": "llama-tiny", "dtype": "float32", "corpus": "c.jsonl", "split_seed": 0, "seq_len": 16}
    manifest = {"schema_version": 2, "kind": "pretrain", "config": config, "arms": {"base": {}, "preskip": {}}}
    for arm, kind in (("base", "llama"), ("preskip", "preskip_llama")):
        cell = run / "arms" / arm / "seed-1"
        settings = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        plain = AutoConfig.for_model(kind, **settings, num_attention_heads=4, max_position_embeddings=64)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(plain).save_pretrained(cell / "model")
        tiny_tokenizer().save_pretrained(cell / "model")
        (cell / "cell.json").write_text("{}")
    (run / "data").mkdir()
    (run / "data" / "heldout.json").write_text(json.dumps([{"name": "c", "documents": corpus}]))
    (run / "run.json").write_text(json.dumps(manifest))
    assert preskip("explain", run, *FEW[:-2], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["source"] == {"kind": "run", "name": "run", "arm": "preskip", "seed": 1}
    assert found["model"]["name"] == "llama-tiny"
    assert found["method"]["context_length"] == 16  # as it was trained, of 64 positions
    assert {text["id"] for text in found["texts"]} == {entry["id"] for entry in corpus}
    assert preskip("explain", run, "--arm", "base", *FEW) == 1
    assert "arm base of" in capsys.readouterr().err


CASES = {
    "nothing": (["{place}/nowhere"], "does not exist or is no folder"),
    "no source": (["{place}"], "has no run.json, adapter_config.json or config.json"),
    "several": (["{place}/several"], "holds the adapters law, code: give the folder that one of them was baked from"),
    "plain model": (["{place}/model"], "is a llama model, which has no branch"),
    "lora": (["{place}/run/arms/lora/seed-1/adapter"], "holds a LORA adapter, which has no branch"),
    "arm": (["{place}/run", "--arm", "preskipp"], "has no arm 'preskipp': choose one of lora, none"),
    "arm without": (
        ["{place}/run", "--arm", "lora"],
        "has no branch: choose one of preskip",
    ),
    "arm of no adapter": (["{place}/run", "--arm", "none"], "arm none of"),
    "seed": (["{place}/run", "--seed", "7"], "has no finished seed 7: choose one of 1, 2"),
    "arm of none": (["{place}/model", "--arm", "lora"], "--arm and --seed are for runs"),
    "short": (["{place}/run", "--text", "a", "--out", "{out}"], "has 1 token: 2 or more are needed"),
    "empty": (["{place}/run", "--text", " ", "--out", "{out}"], "is empty: give a text of 2 or more tokens"),
    "no file": (["{place}/run", "--text", "gone.txt", "--out", "{out}"], "--text gone.txt: no such file"),
    "binary": (["{place}/run", "--text", "{place}/bytes.txt", "--out", "{out}"], "cannot be read: give a UTF-8 text"),
    "exists": (["{place}/run", "--out", "{place}/model"], "exists already: choose another --out"),
    "place": (["{place}/run", "--out", "{place}/corpus.jsonl/out"], "corpus.jsonl: choose another --out"),
    "figures": (["{place}/run", "--figures", "{place}/corpus.jsonl", "--out", "{out}"], "is a file: give a folder"),
    "dtype": (["{place}/run", "--dtype", "float8"], "--dtype 'float8' is unknown"),
    "documents": (["{place}/run", "--documents", "1"], "--documents 1 is not possible: it must be at least 2"),
    "context": (["{place}/run", "--context-length", "9999", "--out", "{out}"], "the model reads at most 256"),
    "corpus": (["{place}/run", "--corpus", "nowhere", "--out", "{out}"], "unknown corpus 'nowhere'"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_in_one_line(case, place, tmp_path, capsys):
    (place / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    (place / "several").mkdir(exist_ok=True)
    several = {"model_type": "preskip_llama", "preskip_adapters": {"law": {}, "code": {}}}
    (place / "several" / "config.json").write_text(json.dumps(several))
    arguments, words = CASES[case]
    arguments = [argument.format(place=place, out=tmp_path / "out") for argument in arguments]
    assert preskip("explain", *arguments) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert words in lines[-1]
    assert list(tmp_path.iterdir()) == []
