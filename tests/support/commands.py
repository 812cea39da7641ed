"""The real command in this process, and a probe of seconds made with it."""

from pathlib import Path

import pytest

from preskip.cli.main import main
from tiny_model import save_tiny_llama, write_corpus

PROBE = ["--steps", "3", "--batch-size", "2", "--seq-len", "16", "--eval-documents", "4", "--eval-words", "30"]
PROBE += ["--last-word-items", "0", "--context-length", "32", "--save-steps", "1", "--device", "cpu"]
PROBE += ["--dtype", "float32", "--heldout-fraction", "0.4", "--match", "none", "--lora-rank", "4"]


def preskip(*arguments) -> int:
    """The exit code of `preskip ARGUMENTS`."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def make_run(folder: Path, *more) -> Path:
    """Make FOLDER/model, FOLDER/corpus.jsonl and FOLDER/run, finished, of arms none, preskip and lora by default."""
    save_tiny_llama(folder / "model")
    arms = [] if "--arms" in more else ["--arms", "none,preskip,lora"]
    options = ["--corpus", write_corpus(folder / "corpus.jsonl"), *arms, *more]
    assert preskip("probe", folder / "model", *PROBE, *options, "--out", folder / "run", "--json") == 0
    return folder
