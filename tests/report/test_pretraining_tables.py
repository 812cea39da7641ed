"""The table of scores in docs/pretraining.md is what the stored run says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARMS = json.loads((ROOT / "results/scratch-books/results.json").read_text())["arms"]


@pytest.mark.parametrize("arm", ARMS)
def test_scores_are_those_stored(arm: str) -> None:
    lines = (ROOT / "docs/pretraining.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith(f"| `{arm}` | ") and "M |" in line and "[" in line)
    for name, digits in (("books", 2), ("sotu", 4)):
        score = ARMS[arm]["metrics"][name]["bits_per_byte"]
        value, low, high = (f"{score[key]:.{digits}f}" for key in ("value", "low", "high"))
        assert f" {value} [{low}, {high}] |" in row
