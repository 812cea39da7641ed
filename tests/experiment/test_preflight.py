"""What is refused before torch is imported, and a disk that is too full."""

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from preskip.assets import is_offline
from preskip.errors import PreskipError
from preskip.experiment import preflight
from preskip.experiment.preflight import check_experiment, check_inputs, check_place, check_space, needed_bytes
from preskip.experiment.pretrain_options import PretrainConfig
from preskip.experiment.probe_options import ProbeConfig

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No data directory, no way to the Hub, and its cache in another place than the usual one."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    for name in ("PRESKIP_DATA", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_what_is_not_there_is_refused(nowhere):
    cases = [
        ({"corpora": ["./no.txt"]}, r"corpus \./no\.txt does not exist: check the path"),
        (
            {"corpora": ["/dev/null"]},
            r"corpus /dev/null is a pipe or a device, and a resume would find it empty: give a file",
        ),
        ({"corpora": ["sotu", "sottu"]}, "unknown corpus 'sottu'"),
        ({"corpora": ["books"]}, "books is read from the data directory: give --data-dir"),
        ({"corpora": ["books"], "data_dir": nowhere}, "books: .*books_train.txt is missing"),
        ({"data_dir": nowhere / "no"}, "--data-dir: folder .*no does not exist"),
        ({"model": str(nowhere / "no")}, "model folder .*no does not exist"),
        ({"model": str(nowhere / "no.gguf")}, "GGUF file .*no.gguf does not exist"),
        ({"tasks": ["lambada_openaj"]}, "lambada_openai"),
    ]
    for given, message in cases:
        with pytest.raises(PreskipError, match=message) as caught:
            check_inputs(**given)
        assert "\n" not in str(caught.value)


def test_a_primary_set_that_is_not_scored_is_refused_before_anything_is_read(nowhere):
    (nowhere / "my text.txt").write_text("a")
    others = (str(nowhere / "my text.txt"), "pydoc:4x9")
    for name in ("sotu", "my-text", "pydoc", "last_word"):
        check_experiment(ProbeConfig(eval_corpora=others, primary=("preskip", "lora", name)))
    message = "^--primary: 'pydocs' is not compared: choose one of sotu, my-text, pydoc, last_word$"
    with pytest.raises(PreskipError, match=message):
        check_experiment(ProbeConfig(eval_corpora=others, primary=("preskip", "lora", "pydocs")))
    with pytest.raises(PreskipError, match=r"^--primary: 'last_word' is not compared: choose one of sotu$"):
        check_experiment(PretrainConfig(primary=("preskip", "base", "last_word")))


def test_what_may_be_there_is_left_to_the_run(nowhere):
    check_inputs(["sotu", "pydoc", "owner/name", "owner/name:config"], model="owner/name")
    check_inputs(tasks=["lambada_openai"])  # in a cache of the Hub, wherever its client finds that
    (nowhere / "books").mkdir()
    for part in ("train", "valid"):
        (nowhere / f"books/books_{part}.txt").write_text("a")
    check_inputs(["books"], data_dir=nowhere)


@pytest.mark.parametrize("hub", [None, "", "0", "1"])
@pytest.mark.parametrize("transformers", [None, "0", "yes"])
def test_offline_is_what_the_client_of_the_hub_takes_for_it(hub, transformers, monkeypatch):
    for name, value in (("HF_HUB_OFFLINE", hub), ("TRANSFORMERS_OFFLINE", transformers)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    code = "from huggingface_hub import constants; print(constants.HF_HUB_OFFLINE)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(is_offline())


def test_lm_eval_is_asked_for_first(nowhere, monkeypatch):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PreskipError, match=r"pip install 'preskip\[eval\]'"):
        check_inputs(tasks=["lambada_openai"])


def test_an_experiment_names_all_that_it_reads(nowhere):
    with pytest.raises(PreskipError, match=r"corpus \./no\.txt"):
        check_experiment(ProbeConfig(eval_corpora=("./no.txt:4x20",)))
    with pytest.raises(PreskipError, match="model folder"):
        check_experiment(ProbeConfig(model="./no"))
    with pytest.raises(PreskipError, match="corpus"):
        check_experiment(PretrainConfig(corpus="./no.txt"))


def test_a_place_that_cannot_be_made_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    check_place(tmp_path / "a/b/run")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PreskipError, match="exists already"):
        check_place(tmp_path)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file/run", Path("/proc/run")):
        with pytest.raises(PreskipError, match="choose another --out"):
            check_place(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 9, 1))
    with pytest.raises(PreskipError, match=r"has 0 MiB free, about 64 MiB are needed: free some"):
        check_place(tmp_path / "run")


def test_a_full_disk_is_found_before_training_by_the_size_of_the_weights(tmp_path, monkeypatch):
    weights = (0, None, 1_000_000, 1_000_000)  # the untouched model has none
    assert needed_bytes(weights, checkpoints=False) == 8e6
    needed = needed_bytes(weights, checkpoints=True)
    assert needed == 8e6 + 16e6
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 9, 7_000_000))
    with pytest.raises(PreskipError, match="has 7 MiB free"):
        check_space(tmp_path, needed)


def test_it_is_looked_at_before_torch(tmp_path):
    code = (
        "import sys\nfrom preskip.cli.main import main\n"
        "try:\n main(['probe', '--corpus', './no.txt'])\n"
        "except SystemExit: print([m for m in ('torch', 'transformers', 'datasets', 'lm_eval') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"
    assert done.stderr.startswith("error: corpus ./no.txt does not exist")
    assert list(tmp_path.iterdir()) == []


def test_what_is_scored_alone_needs_its_held_out_part(tmp_path):
    for name in ("wikitext2/wiki.test.raw", "books/books_valid.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")
    check_inputs(["wikitext2", "books"], data_dir=tmp_path, scored_only=True)
    for name in ("wikitext2", "books"):
        with pytest.raises(PreskipError, match=f"corpus {name}: .*train.* is missing"):
            check_inputs([name], data_dir=tmp_path)
    with pytest.raises(PreskipError, match=r"corpus books24: .*books_train\.txt is missing"):
        check_inputs(["books24"], data_dir=tmp_path, scored_only=True)
