"""Model cards: what they say is what results.json says, and the code in them loads what they are of."""

import builtins
import json
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from transformers import AutoModelForCausalLM, AutoTokenizer

from commands import make_run, preskip
from fixture_run import rich_run
from preskip.cli.runs import write_report
from preskip.data.corpus import Document, load_corpus
from preskip.errors import PreskipError
from preskip.evaluate.likelihood import document_windows, score_sequences
from preskip.report import write_cards
from preskip.report.cards import baked_card, content
from preskip.report.cards.depth import depth_layers, depth_words
from preskip.runs.directory import RunDirectory

RESULTS = Path(__file__).parents[2] / "results"
ARMS = ["preskip", "lora", "preproj+lora", "layernorm"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("place"), "--arms", ",".join(["none", *ARMS]), "--seeds", "1,2")


def adapter(place, arm):
    return place / "run" / "arms" / arm / "seed-2" / "adapter"


def code(card, language="python"):
    return re.search(rf"```{language}\n(.+?)\n```", card.read_text(), re.DOTALL)[1]


def figures(text):
    """A value and its limits, as a card or a table shows them."""
    return [float(number.replace("−", "-").replace(",", "")) for number in re.findall(r"[−+]?[\d.,]*\d", text)]


def stored(place):
    return json.loads((place / "run" / "results.json").read_text())


@pytest.mark.parametrize("arm", ARMS)
def test_values_and_metadata_are_those_of_the_results(place, arm):
    card = ModelCard.load(adapter(place, arm) / "README.md")
    found = stored(place)["arms"][arm]
    assert (card.data.library_name, card.data.model_name) == ("peft", f"model-{arm}-seed-2")
    assert card.data.tags == (["preskip", "adapter"] if arm == "preskip" else ["preskip", "adapter", arm])
    told = {(entry.dataset_type, entry.metric_type): entry.metric_value for entry in card.data.eval_results}
    assert told == {
        (name, metric): value["value"] for name, own in found["metrics"].items() for metric, value in own.items()
    }
    row = next(line for line in card.text.splitlines() if "| bits per byte (lower is better) |" in line)
    value = found["metrics"]["corpus"]["bits_per_byte"]
    assert figures(row.split("|")[3]) == pytest.approx([value[key] for key in ("value", "low", "high")], rel=0.005)
    assert f"{found['trainable_parameters']:,} trained weights" in card.text
    command = json.loads((place / "run" / "run.json").read_text())["command"]
    assert code(adapter(place, arm) / "README.md", "console") == shlex.join(command)


def test_a_difference_is_shown_from_this_arm_s_side(place):
    row = next(row for row in stored(place)["comparisons"] if (row["arm"], row["reference"]) == ("preskip", "lora"))
    lines = (adapter(place, "lora") / "README.md").read_text().splitlines()
    cells = next(line.split("|") for line in lines if line.startswith("| preskip |"))
    assert figures(cells[4]) == pytest.approx([-row["difference"], -row["high"], -row["low"]], rel=0.05)


def test_a_limit_is_not_rounded_onto_zero_beside_a_verdict():
    """As on the page: what lies above 0 does not read [0.0000, ...]."""
    results = json.loads((RESULTS / "standard-wikitext2/results.json").read_text())
    rows = [row for arm in results["arms"] for row in content._difference_rows(results, arm)]
    decided = [figures(row[3]) for row in rows if row[5] in ("better", "worse")]
    assert len(decided) > 50
    assert all(low * high > 0 for _, low, high in decided)


@pytest.mark.parametrize("arm", ARMS)
def test_the_code_in_it_loads_the_model_that_was_scored(place, arm):
    folder, scope = adapter(place, arm), {}
    exec(code(folder / "README.md").replace("PATH_OR_ID", str(folder)), scope)
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    documents = {document.id: document for document in load_corpus(str(place / "corpus.jsonl")).documents}
    rows = [json.loads(line) for line in (folder.parent / "items.jsonl").open()]
    for row in rows:
        text = " ".join(documents[row["id"]].text.split()[:30])
        assert row["bytes"] == len(text.encode())
        windows, _ = document_windows([Document("x", text, "x")], tokenizer, context_length=32, stride=32)
        nats = sum(score.nll for score in score_sequences(scope["model"].eval(), windows))
        assert nats == pytest.approx(row["nll"], rel=1e-6)


def test_the_code_in_it_is_complete(place):
    """In a process of its own, where nothing else has registered the adapter type."""
    folder = adapter(place, "preskip")
    shown = code(folder / "README.md").replace("PATH_OR_ID", str(folder))
    shown += "\nprint(model(torch.arange(2, 9)[None]).logits.abs().sum().item())"
    run = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    scope = {}
    exec(code(folder / "README.md").replace("PATH_OR_ID", str(folder)), scope)
    with torch.no_grad():
        wanted, plain = (m(torch.arange(2, 9)[None]).logits.abs().sum().item() for m in (scope["model"], load(place)))
    assert float(run.stdout) == pytest.approx(wanted, rel=1e-6)
    assert wanted != pytest.approx(plain, rel=1e-6)


def load(place):
    return AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()


def test_arms_without_an_adapter_get_no_card(place):
    assert not list((place / "run" / "arms" / "none").rglob("README.md"))
    assert not (adapter(place, "lora") / "depth.png").exists()
    assert "depth.png" not in (adapter(place, "lora") / "README.md").read_text()


def test_report_writes_them_again(place, capsys):
    path = adapter(place, "preskip") / "README.md"
    before = path.read_text()
    path.write_text("lost")
    assert preskip("report", place / "run") == 0
    assert path.read_text() == before


def test_cards_are_written_where_the_extra_of_the_page_is_missing(place, capsys, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] in ("altair", "jinja2", "vl_convert"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **options)

    path = adapter(place, "preskip") / "README.md"
    before = path.read_text()
    path.write_text("lost")
    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", without)
        assert preskip("report", place / "run") == 1
    assert "pip install 'preskip[report]'" in capsys.readouterr().err
    assert path.read_text().splitlines()[0] == before.splitlines()[0]
    assert preskip("report", place / "run") == 0
    assert path.read_text() == before


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def synthetic(run):
    rich_run(run)
    for arm in ("preskip", "lora"):
        folder = run / "arms" / arm / "seed-1" / "adapter"
        folder.mkdir(parents=True, exist_ok=True)
        kind = "PRESKIP" if arm == "preskip" else "LORA"
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    return run


def test_the_depth_figure_and_what_it_says_in_words(tmp_path):
    run = synthetic(tmp_path / "run")
    written = write_cards(run)
    assert [path.parent.parent.parent.name for path in written] == ["preskip", "lora"]
    folder = written[0].parent
    width, height = png_size(folder / "depth.png")
    assert width > 1000
    assert height > 300
    assert (folder / "depth.png").stat().st_size < 150_000
    words = re.search(r"!\[(.+)\]\(depth\.png\)", written[0].read_text())[1].replace("\\", "")
    results = json.loads((run / "results.json").read_text())
    rows = results["depth"]["preskip"]["1"]
    low, high = (f(rows, key=lambda row: row["skip_norm"]) for f in (min, max))
    assert f"from {low['skip_norm']:.3g} in layer {low['layer']} to {high['skip_norm']:.3g}" in words
    trend = next(row for row in results["trend"]["preskip"] if row["measure"] == "skip_norm")
    assert f"rank correlation with depth {trend['rho']:+.2f}" in words
    assert "grows with depth" in words
    assert not (written[1].parent / "depth.png").exists()
    card = baked_card(run, "preskip", 1, "mine")
    assert card.figure == (folder / "depth.png").read_bytes()
    assert ModelCard(card.text).data.library_name == "transformers"
    assert baked_card(run, "preskip", 77, "mine") is None


def test_a_part_that_an_arm_lacks_is_neither_drawn_nor_spoken_of():
    """The attention of `content` reads what it read before: the profile holds 0 there, in every layer."""
    results = json.loads((RESULTS / "confirmatory-smollm2-books24" / "results.json").read_text())
    assert {row["enrichment"] for row in results["depth"]["content"]["1"]} == {0.0}
    layers = depth_layers(results, "content", 1)
    assert len(layers) == 30
    assert {layer["enrichment"] for layer in layers} == {None}
    assert "enrichment" not in depth_words(layers, [])
    assert "enrichment" in depth_words(depth_layers(results, "preskip", 1), [])


def test_without_the_extra_there_is_no_figure_and_no_link_to_one(tmp_path, monkeypatch):
    run = synthetic(tmp_path / "run")
    (card, _) = write_cards(run)
    assert (card.parent / "depth.png").is_file()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    write_cards(run)
    assert not (card.parent / "depth.png").exists()
    assert "depth.png" not in card.read_text()
    assert "## Limits" in card.read_text()


def change(run, **parts):
    """Update entries of run.json's parts."""
    record = json.loads((run / "run.json").read_text())
    for part, new in parts.items():
        record[part] = {**record[part], **new} if isinstance(new, dict) else new
    (run / "run.json").write_text(json.dumps(record))


def test_a_base_from_the_hub_is_named_and_loaded_at_its_commit(tmp_path):
    run = synthetic(tmp_path / "run")
    change(run, model={"name": "some/model", "source": "Hugging Face Hub some/model", "revision": "c0ffee"})
    for card in write_cards(run):
        assert ModelCard.load(card).data.base_model == "some/model"
        loading = 'AutoModelForCausalLM.from_pretrained("some/model", dtype=torch.float32, revision="c0ffee")'
        assert loading in code(card)
    change(run, model={"name": "some/model", "source": "local folder /home/some/model", "revision": None})
    for card in write_cards(run):
        assert ModelCard.load(card).data.base_model is None
        assert 'load_model("some/model", dtype=torch.float32)' in code(card)


@pytest.mark.parametrize(
    "odd",
    [
        'a|b: *c* <script> "d" #e',
        "---\nlicense: mit\n---",
        "![x](y) [z](w) `v`` & &amp; ~~s~~ $m$",
        "```\n# one\n```",
        "__a__ _b_ c_d__e \\| 'q' {f: [g]}",
        "- x\n\n> y\u2028z",
        "12. --- x",
        "=====",
    ],
)
def test_names_with_mark_up_are_shown_as_they_are(tmp_path, odd):
    run = synthetic(tmp_path / "run")
    plain = (write_cards(run)[0]).read_text()
    change(run, corpus={"name": odd}, model={"name": odd}, command=["preskip", "probe", odd, "--corpus", odd])
    results = json.loads((run / "results.json").read_text())
    results["sets"]["books"]["title"] = odd
    (run / "results.json").write_text(json.dumps(results))
    card = write_cards(run)[0]
    loaded = ModelCard.load(card)
    shown = " ".join(odd.split())
    assert loaded.data.model_name == f"{shown.rsplit('/')[-1]}-preskip-seed-1"
    assert loaded.data.license is None
    assert odd in {entry.dataset_name for entry in loaded.data.eval_results}
    tokens, before = parse(loaded.text), parse(ModelCard(plain).text)
    # The same structure, and every name as it is.
    assert [token.type for token in tokens] == [token.type for token in before]
    texts = ["".join(child.content for child in token.children) for token in tokens if token.type == "inline"]
    assert texts[0] == loaded.data.model_name
    assert {child.type for token in tokens for child in token.children or ()} <= {"text", "text_special", "image"}
    in_cells = [token.content for token in before if token.type == "inline"].count("books")
    assert texts.count(shown) == in_cells > 2
    assert any(text.startswith(f"Text: {shown} (") for text in texts)
    commands = [token.content for token in tokens if token.type == "fence" and token.info == "console"]
    assert [shlex.split(command) for command in commands] == [["preskip", "probe", odd, "--corpus", odd]]


def parse(text):
    """An independent reading of Markdown, with GitHub's tables and struck text."""
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)


def test_results_that_lack_something_are_refused_in_one_line(tmp_path):
    run = synthetic(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    del results["arms"]["preskip"]["base_dtype"]
    (run / "results.json").write_text(json.dumps(results))
    with pytest.raises(PreskipError, match="lacks what a model card needs"):
        write_cards(run)


def test_a_damaged_file_is_named(tmp_path):
    run = synthetic(tmp_path / "run")
    config = run / "arms" / "lora" / "seed-1" / "adapter" / "adapter_config.json"
    config.write_text("{")
    with pytest.raises(PreskipError, match=f"^{re.escape(str(config))} cannot be read"):
        write_cards(run)


def test_a_card_that_cannot_be_written_costs_neither_page_nor_results(tmp_path, capsys):
    run = synthetic(tmp_path / "run")
    (run / "arms" / "lora" / "seed-1" / "adapter" / "adapter_config.json").write_text("{")
    assert write_report(RunDirectory(run), False) == run / "report.html"
    assert (run / "report.html").is_file()
    assert "no model cards: " in capsys.readouterr().err
