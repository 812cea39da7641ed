"""The odd corpora through every command: no traceback, one line where one is refused, nothing left half-written."""

import gzip
import itertools
import json

import pytest

from commands import preskip
from odd_inputs import FORMS, PROSE, Odd, every, read, write
from preskip.assets import load_tokenizer
from tiny_model import save_tiny_llama, tiny_llama

RUN = ["--batch-size", 2, "--seq-len", 8, "--eval-documents", 2, "--eval-words", 8, "--save-steps", 1, "--out", "out"]
RUN += ["--heldout-fraction", "0.4", "--device", "cpu", "--dtype", "float32"]
SMALL = ["--num-layers", 1, "--hidden-size", 8, "--heads", 1, "--kv-heads", 1, "--mlp-width", 8, "--eval-blocks", 1]
SMALL += ["--eval-steps", 1, "--report-to", "none", "--peak-flops", "1e9"]
MORE = [f"{text} {text.replace('Record', 'Report')}" for text in PROSE] + [text.upper() for text in PROSE]
TEXT_IDS = [f"a#{number:02d}" for number in range(len(MORE))]
ALL = [odd for odd in every() if odd.options != ("accident",)][::3]  # all of them are read in test_reading.py
ACCIDENTS = [odd for odd in every() if odd.options == ("accident",)][:10]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model with its tokenizer and an adapter; the model is loaded once for all."""
    from peft import get_peft_model

    from preskip import PreskipConfig

    folder = tmp_path_factory.mktemp("odd")
    save_tiny_llama(folder / "model", num_hidden_layers=1)
    adapter = get_peft_model(tiny_llama(num_hidden_layers=1), PreskipConfig())
    adapter.peft_config["default"].base_model_name_or_path = str(folder / "model")
    adapter.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(autouse=True)
def _once(places, monkeypatch):
    """Reading the tokenizer and drawing the page again and again would take most of the time."""
    monkeypatch.setattr("preskip.report.build_report", lambda run: run / "report.html")
    tokenizer = load_tokenizer(str(places / "model"))
    monkeypatch.setattr("preskip.assets.load_tokenizer", lambda *args, **options: tokenizer)
    monkeypatch.setattr("preskip.experiment.frozen.load_tokenizer", lambda *args, **options: tokenizer)


def command(name, places, corpus, *more):
    """The arguments of one command on a corpus."""
    model = places / "model"
    own = {
        "eval": [model, "--context-length", 64, "--out", "out"],
        "audit": [model, "--lambada", 0, "--documents", 2, "--words", 5],
        "explain": [places / "adapter", "--documents", 2, "--words", 5, "--dtype", "float32", "--out", "out"],
        "probe": [model, "--arms", "none,preskip", "--last-word-items", 0, "--context-length", 32, "--steps", 2, *RUN],
        "pretrain": ["--tokenizer", model, "--arms", "base", "--tokens", 16, "--warmup-steps", 0, *SMALL, *RUN],
    }[name]
    own += ["--ablation-documents", 0, "--attention-documents", 0] if name == "explain" else []
    return [name, *own, "--corpus", corpus, *more, "--json"]


COMMANDS = ("eval", "audit", "explain", "probe", "pretrain")


def walk(name, places, odd, folder, capsys, monkeypatch):
    """Run a command where the corpus lies beside an empty folder; return exit code and its JSON document."""
    (folder / "in").mkdir()
    (folder / "work").mkdir()
    path = odd.make(folder / "in")
    monkeypatch.chdir(folder / "work")
    options = () if odd.options == ("accident",) else odd.options
    code = preskip(*command(name, places, path, *options))
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    document = json.loads(printed.out)
    left = [
        found.name for found in (folder / "work").rglob("*") if found.name.startswith(".") or found.suffix == ".tmp"
    ]
    assert set(left) <= {".lock"}
    if code:
        assert code == 1
        assert document.keys() == {"error"}
        assert len(printed.err.strip().splitlines()[-1]) < 1200
        assert not (folder / "work" / "out").exists()
    return code, document


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *itertools.product(("eval", "audit", "pretrain"), [*FORMS, "txt", "txt.gz"]),
        *itertools.product(("explain", "probe"), ("jsonl", "txt.gz")),  # one function reads the forms for all
    ],
)
def test_every_form_through_a_command(name, form, places, tmp_path, capsys, monkeypatch):
    def make(folder):
        if not form.startswith("txt"):
            return write(folder / f"a.{form}", [*MORE[:3], None, *MORE[3:]], number="id")
        content = "\f".join(MORE).encode()
        (folder / f"a.{form}").write_bytes(gzip.compress(content) if form.endswith("gz") else content)
        return folder / f"a.{form}"

    code, document = walk(name, places, Odd(form, make, MORE), tmp_path, capsys, monkeypatch)
    assert code == 0, document
    if name == "eval":
        items = (tmp_path / "work" / "out" / "items.jsonl").read_text().splitlines()
        ids = [str(number) for number in range(len(MORE) + 1) if number != 3]
        assert sorted(json.loads(item)["id"] for item in items) == sorted(TEXT_IDS if form.startswith("txt") else ids)
        assert document["sets"]["a"]["documents"] == len(MORE)
        assert document["sets"]["a"]["bytes"] == sum(len(text.encode()) for text in MORE)


@pytest.mark.parametrize("number", range(len(ALL)), ids=[odd.name for odd in ALL])
def test_every_odd_corpus_through_a_command(number, places, tmp_path, capsys, monkeypatch):
    odd, name = ALL[number], COMMANDS[number % 5] if number % 15 < 5 else "eval"
    code, document = walk(name, places, odd, tmp_path, capsys, monkeypatch)
    if odd.texts is None:
        assert code == 1
    elif name == "eval" and code == 0:
        (described,) = document["sets"].values()
        assert described["documents"] == len(odd.texts)
        assert described["bytes"] == sum(len(text.encode()) for text in read(odd.texts))


@pytest.mark.parametrize("odd", ACCIDENTS, ids=[odd.name for odd in ACCIDENTS])
def test_every_accident_through_eval(odd, places, tmp_path, capsys, monkeypatch):
    walk("eval", places, odd, tmp_path, capsys, monkeypatch)
