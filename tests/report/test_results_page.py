"""The tables of docs/results.md are those of the stored runs."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNS = sorted(ROOT.glob("results/standard-*/results.json"))


def tables(results):
    spec = importlib.util.spec_from_file_location("results_tables", ROOT / "benchmarks" / "results_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.tables(results))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.parent.name)
def test_tables_are_those_of_the_stored_results(path):
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    found = tables(json.loads(path.read_text()))
    assert len(found) == 5
    for heading, table in found:
        assert len(table.splitlines()) > 2
        assert table in page, f"{heading} of {path.parent.name}: run benchmarks/results_tables.py again"
