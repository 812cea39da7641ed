"""The runs kept in results/: every figure recomputed from their items and cells equals what they have stored."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from nested import assert_close
from preskip.runs.directory import RunDirectory
from preskip.runs.files import read_json
from preskip.runs.stored import load_runs
from preskip.stats import compare_arms, measured_power, summarise
from preskip.stats.trends import arm_trends

RESULTS = Path(__file__).parents[2] / "results"
NAMES = ["standard-wikitext2", "standard-books", "scratch-books"]
NAMES += [
    f"confirmatory-{model}-{corpus}" for model in ("smollm2", "gemma-3-270m") for corpus in ("wikitext2", "books24")
]
NAMES += ["peers/llama-1m/study"]

# numpy 2.5 draws a few binomials otherwise, see "The same digits" in docs/statistics.md.
IS_DRAWN_ALIKE = tuple(int(part) for part in np.__version__.split(".")[:2]) < (2, 5)
TOLERANCE = {"rel": 1e-12} if IS_DRAWN_ALIKE else {"rel": 5e-3, "abs": 3e-4}
# Older runs lack what was added since.
assert_same = partial(assert_close, more=True, **TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_figures_recomputed_equal_those_stored(name: str) -> None:
    run, results = RunDirectory(RESULTS / name), read_json(RESULTS / name / "results.json")
    stored = load_runs([run.path], allow_different_dtype=True)
    comparisons = compare_arms(stored.items, stored.family, stored.sets)
    assert_same(comparisons, results["comparisons"], "comparisons")
    assert_same(measured_power(comparisons, stored.family), results["power"], "power")
    for arm, items in stored.items.items():
        assert_same(summarise(items), results["arms"][arm]["metrics"], arm)


@pytest.mark.parametrize("name", NAMES)
def test_trends_recomputed_equal_those_stored(name: str) -> None:
    run, results = RunDirectory(RESULTS / name), read_json(RESULTS / name / "results.json")
    assert results["trend"]
    for arm, trends in results["trend"].items():
        cells = {str(seed): read_json(run.cell(arm, seed).summary) for seed in results["arms"][arm]["seeds"]}
        depth, ablation = ({s: cell.get(part) or [] for s, cell in cells.items()} for part in ("depth", "ablation"))
        nulls = {null: by_arm[arm] for null, by_arm in results.get("nulls", {}).items() if arm in by_arm}
        equal = {s: run.control("equal_step", arm, int(s)) for s in results.get("equal_step", {}).get(arm, {})}
        rows = {seed: read_json(control.summary)["depth"] for seed, control in equal.items()}
        assert_same(arm_trends(depth, ablation, nulls, rows), trends, arm)
