"""A probe of seconds, and what it leaves in its run directory, without times and memory."""

import json
from pathlib import Path
from typing import Any

from preskip.experiment.probe_options import ProbeConfig
from tiny_model import save_tiny_llama, write_corpus

OTHER_ORDER = {"rel": 1e-4, "abs": 1e-5}  # what another order of adding moves
MEASURED = {"seconds", "seconds_per_step", "train_seconds", "evaluate_seconds", "peak_memory_bytes"}


def small_probe(folder: Path, **changes) -> ProbeConfig:
    """Two seeds of preskip, whose learning rate is searched for, on a tiny model and text that are made in a folder."""
    options = {
        "model": str(save_tiny_llama(folder / "model")),
        "corpus": str(write_corpus(folder / "corpus.jsonl", 60)),
        "seeds": (1, 2),
        "arms": ("none", "preskip"),
        "lr_mode": "tune",
        "development_documents": 2,
        "heldout_fraction": 0.4,
        "steps": 3,
        "batch_size": 2,
        "seq_len": 16,
        "context_length": 32,
        "eval_documents": 3,
        "eval_words": 20,
        "last_word_items": 4,
        "save_steps": 1,
        "dtype": "float32",
        "device": "cpu",
    }
    return ProbeConfig(**{**options, **changes})


def stored(run: Path) -> dict[str, Any]:
    """Results, cells, searches, logs and items of a run, by path, without what differs from run to run."""
    files = [run / "results.json", *run.rglob("cell.json"), *run.rglob("search.json"), *run.rglob("*.jsonl")]
    return {
        str(path.relative_to(run)): [_unmeasured(json.loads(line)) for line in path.read_text().splitlines()]
        if path.suffix == ".jsonl"
        else _unmeasured(json.loads(path.read_text()))
        for path in files
    }


def _unmeasured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unmeasured(part) for key, part in value.items() if key not in MEASURED}
    return [_unmeasured(part) for part in value] if isinstance(value, list) else value
