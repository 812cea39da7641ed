"""A model of the Hub that gets another revision while a run is interrupted: the run goes on with its own."""

import shutil

import pytest
import torch
from huggingface_hub import constants

from preskip.assets import load_model, resolve_model
from preskip.cli.bake import bake_saved
from preskip.cli.explain import _load
from preskip.cli.serve import _key
from preskip.errors import PreskipError
from preskip.experiment import frozen
from preskip.experiment.run import finish_run, start_run
from preskip.runs.weights import find_source
from small_probe import small_probe
from tiny_model import save_tiny_llama

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache of the Hub with two revisions of `o/m`; gives a function that says which of them is its newest."""
    repository = tmp_path / "hub" / "models--o--m"
    for revision, width in ((FIRST, 64), (SECOND, 96)):
        save_tiny_llama(repository / "snapshots" / revision, intermediate_size=width)
    (repository / "refs").mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def newest(revision):
        (repository / "refs" / "main").write_text(revision)

    newest(FIRST)
    return newest


def test_a_revision_is_loaded(hub):
    assert resolve_model("o/m").revision == FIRST
    hub(SECOND)
    assert (resolve_model("o/m").revision, resolve_model("o/m", FIRST).revision) == (SECOND, FIRST)
    widths = [load_model("o/m", torch.float32, revision=one).config.intermediate_size for one in (None, FIRST)]
    assert widths == [96, 64]


def test_what_is_made_of_a_run_has_its_revision(hub, tmp_path):
    options = {"model": "o/m", "lr_mode": "default", "steps": 2, "last_word_items": 0, "seeds": (1,)}
    run = start_run(small_probe(tmp_path, **options), tmp_path / "run", ["test"])
    finish_run(run, quiet=True)
    adapter = run.cell("preskip", 1).adapter
    snapshots = tmp_path / "hub" / "models--o--m" / "snapshots"
    shutil.rmtree(snapshots / SECOND)
    torch.manual_seed(1)
    other = load_model("o/m", torch.float32)
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    other.save_pretrained(snapshots / SECOND)  # without a tokenizer
    hub(SECOND)
    trained_on = load_model("o/m", torch.float32, revision=FIRST).get_input_embeddings().weight
    bake_saved({"one": adapter}, tmp_path / "baked", quiet=True)
    explained, _ = _load(find_source(run.path), None, "float32", "cpu", False)
    for made in (load_model(str(tmp_path / "baked"), torch.float32), explained):
        assert torch.equal(made.get_input_embeddings().weight, trained_on)
    with pytest.raises(PreskipError, match="tokenizer"):  # the newest, where the base is given
        bake_saved({"one": adapter}, tmp_path / "again", model="o/m", quiet=True)
    assert _key(adapter, "o/m", "float32", FIRST) != _key(adapter, "o/m", "float32", SECOND)


def test_a_run_keeps_its_revision(hub, tmp_path, monkeypatch):
    options = {"model": "o/m", "lr_mode": "default", "steps": 2, "last_word_items": 0, "seeds": (1,)}
    run = start_run(small_probe(tmp_path, **options), tmp_path / "run", ["test"])
    train = frozen.train_frozen

    def stopped(*arguments, **where):
        raise KeyboardInterrupt

    monkeypatch.setattr(frozen, "train_frozen", stopped)
    with pytest.raises(KeyboardInterrupt):
        finish_run(run, quiet=True)
    assert run.manifest["declaration"]["content"]["model"] == FIRST
    hub(SECOND)
    monkeypatch.setattr(frozen, "train_frozen", train)
    finish_run(run, quiet=True)
    assert (run.manifest["model"]["revision"], run.manifest["status"]) == (FIRST, "finished")
    shutil.rmtree(tmp_path / "hub" / "models--o--m" / "snapshots" / FIRST)
    with pytest.raises(PreskipError, match="model o/m: "):
        finish_run(run, quiet=True)
