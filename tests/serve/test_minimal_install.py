"""The package with torch and transformers alone, and the line that names an extra."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from preskip import registration
from preskip.assets import gguf_files

# What a server's environment lacks: nothing of it may be imported, nor found by transformers.
ABSENT = ("peft", "accelerate", "wrapt", "datasets", "scipy", "gguf", "psutil", "pyarrow", "pandas", "lm_eval")
BLOCK = f"""
import sys
import importlib.metadata

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
_distribution = importlib.metadata.distribution
def distribution(name):
    if name.replace("-", "_") in {ABSENT}:
        raise importlib.metadata.PackageNotFoundError(name)
    return _distribution(name)
importlib.metadata.distribution = distribution
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCK + code], capture_output=True, text=True, timeout=300)


def test_architectures_and_their_checkpoints_need_torch_and_transformers_alone(tmp_path):
    done = run(f"""
import pickle, preskip, preskip.architecture
from transformers import AutoConfig, AutoModelForCausalLM
import torch
config = AutoConfig.for_model("preskip_llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                              num_attention_heads=4, vocab_size=64)
model = AutoModelForCausalLM.from_config(config).eval()
model.save_pretrained({str(tmp_path)!r})
again = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, dtype=torch.float32).eval()
ids = torch.arange(8)[None]
assert torch.equal(again(ids).logits, model(ids).logits)
open({str(tmp_path / "config.pickle")!r}, "wb").write(pickle.dumps(config))
print([name for name in {ABSENT} if name in sys.modules])
""")
    assert done.stdout.strip() == "[]", done.stderr[-800:]
    # As an engine's process does before any plug-in has run: the config's class is imported by its name.
    done = run(f"""
import pickle
config = pickle.load(open({str(tmp_path / "config.pickle")!r}, "rb"))
print(type(config).__name__, config.preskip_expansion)
""")
    assert done.stdout.split() == ["PreskipLlamaConfig", "1.25"], done.stderr[-800:]


@pytest.mark.parametrize("json", [[], ["--json"]])
def test_a_command_without_its_extra_names_it(json):
    done = run(f"""
from preskip.cli.main import main
main(["power", "--items", "1500", "--seeds", "3", *{json}])
""")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line == "error: this needs scipy, which is not installed: pip install 'preskip[train]'"
    assert bool(done.stdout) is bool(json)


def test_help_needs_no_extra():
    done = run("""
from preskip.cli.main import main
main(["--help"])
""")
    assert done.returncode == 0, done.stderr[-800:]


def test_a_module_imported_later_is_extended_and_stays_itself(tmp_path, monkeypatch):
    (tmp_path / "imported_later.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    seen = []
    finder = registration._AfterImport({"imported_later": lambda module: seen.append((module, module.value))})
    sys.meta_path.insert(0, finder)
    module = importlib.import_module("imported_later")
    assert seen == [(module, 1)]
    assert module.__loader__.get_source("imported_later") == "value = 1\n"
    assert type(module.__loader__) is SourceFileLoader
    assert importlib.util.find_spec("imported_later").origin == str(tmp_path / "imported_later.py")
    assert importlib.reload(module) is module
    assert seen == [(module, 1)] * 2
    monkeypatch.delitem(sys.modules, "imported_later")


def test_a_gguf_file_without_its_reader_names_the_extra(monkeypatch):
    """What transformers raises then is an ImportError that names no module."""
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        line = gguf_files._explain(Path("a.gguf"), ImportError("Please install torch and gguf>=0.10.0"))
    assert line == "GGUF file a.gguf: reading it needs gguf, which is not installed: pip install 'preskip[train]'"
