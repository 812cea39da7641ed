"""Model cards: what they say is what results.json says, and the code in them loads what they are of."""

import json
import re
import shlex
import struct

import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from commands import make_run, preskip
from preskip.data.corpus import Document, load_corpus
from preskip.errors import PreskipError
from preskip.evaluate.likelihood import document_windows, score_sequences
from preskip.report import write_cards
from preskip.report.card import baked_card
from preskip.report.card_text import escape
from report.fixture_run import rich_run

ARMS = ["preskip", "lora", "preproj+lora", "layernorm"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("place"), "--arms", ",".join(["none", *ARMS]), "--seeds", "1,2")


def adapter(place, arm):
    return place / "run" / "arms" / arm / "seed-2" / "adapter"


def code(card, language="python"):
    return re.search(rf"```{language}\n(.+?)\n```", card.read_text(), re.DOTALL)[1]


def stored(place):
    return json.loads((place / "run" / "results.json").read_text())


@pytest.mark.parametrize("arm", ARMS)
def test_values_and_metadata_are_those_of_the_results(place, arm):
    card = ModelCard.load(adapter(place, arm) / "README.md")
    found = stored(place)["arms"][arm]
    assert (card.data.library_name, card.data.model_name) == ("peft", f"model-{arm}-seed-2")
    assert {"preskip", "adapter", arm} == set(card.data.tags)
    told = {(entry.dataset_type, entry.metric_type): entry.metric_value for entry in card.data.eval_results}
    assert told == {
        (name, metric): value["value"] for name, own in found["metrics"].items() for metric, value in own.items()
    }
    for value in found["metrics"]["corpus"].values():
        assert f"| {value['value']:.4f} \\[{value['low']:.4f}, {value['high']:.4f}\\] |" in card.text
    assert f"{found['trainable_parameters']:,} trained weights" in card.text
    command = json.loads((place / "run" / "run.json").read_text())["command"]
    assert code(adapter(place, arm) / "README.md", "console") == shlex.join(command)


def test_a_difference_is_shown_from_this_arm_s_side(place):
    row = next(row for row in stored(place)["comparisons"] if (row["arm"], row["reference"]) == ("preskip", "lora"))
    wanted = f"{-row['difference']:+.4f} \\[{-row['high']:+.4f}, {-row['low']:+.4f}\\]"
    assert re.search(rf"\| preskip \|.+{re.escape(wanted)}", (adapter(place, "lora") / "README.md").read_text())


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


def test_names_with_mark_up_are_shown_as_they_are(tmp_path):
    run = synthetic(tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    odd = 'a|b: *c* <script> "d" #e'
    record["corpus"]["name"] = record["model"]["name"] = odd
    (run / "run.json").write_text(json.dumps(record))
    (card, _) = write_cards(run)
    loaded = ModelCard.load(card)
    assert loaded.data.model_name == f"{odd}-preskip-seed-1"
    assert "<script>" not in re.sub(r"```.+?```", "", loaded.text, flags=re.DOTALL).replace("\\<script\\>", "")
    assert escape("a_b _c_") == "a_b \\_c\\_"


def test_results_that_lack_something_are_refused_in_one_line(tmp_path):
    run = synthetic(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    del results["arms"]["preskip"]["base_dtype"]
    (run / "results.json").write_text(json.dumps(results))
    with pytest.raises(PreskipError, match="lacks what a model card needs"):
        write_cards(run)
