"""Item records and run directories with known differences, for the tests of statistics and of what reads runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from preskip.runs.directory import RunDirectory
from preskip.runs.files import write_json, write_jsonl
from preskip.runs.schema import CellSummary


def make_items(seed: int, documents: int = 12, shift: float = 0.0, rate: float = 0.4) -> list[dict[str, Any]]:
    """Documents of "heldout" and five "cloze" items cut from each; `shift` in nats per byte, `rate` of right answers.

    Difficulty belongs to the document, and is the same whatever the arm or its seed.
    """
    shared, own = np.random.default_rng(0), np.random.default_rng(seed)
    items: list[dict[str, Any]] = []
    for d in range(documents):
        size = int(shared.integers(800, 4000))
        nll = size * (0.65 + 0.1 * shared.random()) + size * (shift + 0.005 * own.standard_normal())
        items.append(
            {
                "set": "heldout",
                "kind": "document",
                "id": f"doc-{d}",
                "cluster": None,
                "nll": nll,
                "tokens": size // 4,
                "bytes": size,
                "words": size // 6,
            }
        )
        for k in range(5):
            scores = {"acc": int(own.random() < rate), "nll": 1.0 + float(own.random())}
            items.append(
                {"set": "cloze", "kind": "item", "id": f"doc-{d}#{k}", "cluster": f"doc-{d}", "scores": scores}
            )
    return items


def write_run(
    path: Path,
    arms: Mapping[str, Mapping[int, list[dict[str, Any]]]],
    *,
    sha256: str = "a" * 64,
    corpus: str = "heldout",
    dtype: str = "float32",
    family: Mapping[str, Any] | None = None,
) -> Path:
    """A run directory of the current schema with these items by arm and seed."""
    run = RunDirectory.create(
        path,
        {
            "config": {"dtype": dtype, "seeds": sorted({seed for cells in arms.values() for seed in cells})},
            "model": {"name": "tiny", "sha256": sha256},
            "corpus": {"name": corpus, "sha256": None},
            "arms": {arm: {"description": arm, "base_dtype": dtype, "compute_dtype": dtype} for arm in arms},
            "family": dict(family or {"declared": []}),
        },
    )
    for arm, cells in arms.items():
        for seed, items in cells.items():
            cell = run.cell(arm, seed)
            write_jsonl(cell.items, items)
            write_json(cell.summary, {**dict.fromkeys(CellSummary.__required_keys__), "seed": seed})
    return run.path


def invoke_app(command: str, *arguments: object, columns: int = 140) -> str:
    """Standard output of a `preskip` command at a fixed width; its error is raised."""
    from preskip.cli.main import app

    printed = StringIO()
    with redirect_stdout(printed), patch.dict(os.environ, COLUMNS=str(columns)):
        app([command, *map(str, arguments)], result_action="return_value")
    return printed.getvalue()
