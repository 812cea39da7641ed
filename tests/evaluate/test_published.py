"""Published figures: as in EleutherAI's own files, found under the right names, and the distance to them."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from scipy.stats import norm

from preskip.data.local import data_directory
from preskip.errors import PreskipError
from preskip.evaluate.paper import COLUMNS
from preskip.evaluate.published import (
    accuracy_distance,
    paper_table,
    perplexity_distance,
    published_figures,
    published_models,
    recognise_published,
)


@pytest.mark.parametrize("size", ["160m", "410m"])
def test_figures_are_those_of_the_published_files(size):
    directory = data_directory()
    file = None if directory is None else directory / f"pythia/{size}_step143000.zero_shot.json"
    if file is None or not file.is_file():
        pytest.skip(f"no published evaluation of pythia-{size} (PRESKIP_DATA={os.environ.get('PRESKIP_DATA')})")
    results = json.loads(Path(file).read_text())["results"]
    figures = published_figures(f"pythia-{size}")
    assert "lambada_openai" in figures.tasks
    assert figures.tasks == {task: results[task] for task in figures.tasks}


def test_published_standard_errors_fit_their_accuracies():
    """Where both are given, stderr² = p(1 - p) / (n - 1) with LAMBADA's 5,153 items."""
    for model in ("pythia-70m", "pythia-160m", "pythia-410m"):
        lambada = published_figures(model).tasks["lambada_openai"]
        assert lambada["acc_stderr"] == pytest.approx(math.sqrt(lambada["acc"] * (1 - lambada["acc"]) / 5152))


def test_accuracy_grows_with_the_model():
    assert published_models()[0] == "pythia-70m"
    assert published_models()[-1] == "pythia-12b"
    accuracies = [published_figures(model).tasks["lambada_openai"]["acc"] for model in published_models()]
    assert len(accuracies) == 8
    assert accuracies == sorted(accuracies)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("EleutherAI/pythia-160m", "pythia-160m"),
        ("/models/Pythia-1.4b/", "pythia-1.4b"),
        ("C:\\models\\pythia-70m", "pythia-70m"),
        ("EleutherAI/pythia-160m-deduped", None),
        ("EleutherAI/pythia-160m-seed1", None),
        ("EleutherAI/pythia-160m-v0", None),
        ("smollm2", None),
    ],
)
def test_models_are_recognised_by_name(name, found):
    assert recognise_published(name) == found


def test_a_copied_folder_is_recognised_by_its_configuration():
    assert recognise_published("/tmp/x", SimpleNamespace(_name_or_path="EleutherAI/pythia-410m")) == "pythia-410m"
    assert recognise_published("/tmp/x", SimpleNamespace(_name_or_path=None)) is None


def test_an_unknown_model_is_one_line_that_names_the_known():
    with pytest.raises(PreskipError, match=r"no published figures of 'pythia-14m'.*pythia-160m"):
        published_figures("pythia-14m")


def test_accuracy_distance_is_wilsons_interval_moved_by_the_published_figure():
    correct, items, published = 30, 100, 0.3283
    z, p = norm.ppf(0.975), correct / items
    centre = (p + z**2 / (2 * items)) / (1 + z**2 / items)
    half = z * math.sqrt(p * (1 - p) / items + z**2 / (4 * items**2)) / (1 + z**2 / items)
    distance = accuracy_distance(correct, items, published)
    assert distance["difference"] == pytest.approx(p - published)
    assert distance["low"] == pytest.approx(centre - half - published)
    assert distance["high"] == pytest.approx(centre + half - published)
    assert distance["agrees"]
    assert not accuracy_distance(64, 500, published)["agrees"]  # the paper's bf16 baseline


def test_perplexity_distance():
    distance = perplexity_distance([1.0, 3.0], math.exp(1.0))
    assert distance["measured"] == pytest.approx(math.exp(2.0))
    assert distance["ratio"] == pytest.approx(math.e)


def test_the_papers_table_has_its_arms_columns_and_headline_changes():
    for model in ("pythia-160m", "pythia-410m"):
        table = paper_table(model)
        assert list(table) == ["none", "preproj", "lora-attention", "preproj+lora", "preskip"]
        assert all(set(row) == {"trainable_parameters", *COLUMNS} for row in table.values())
    table = paper_table("pythia-160m")
    assert table["preskip"]["paper:lambada"] / table["none"]["paper:lambada"] - 1 == pytest.approx(0.406, abs=5e-4)
    assert table["preskip"]["paper:wikitext"] / table["none"]["paper:wikitext"] - 1 == pytest.approx(-0.389, abs=5e-4)
    assert paper_table("pythia-70m") is None


def test_the_table_in_the_docs_is_the_stored_one():
    text = (Path(__file__).parents[2] / "docs/paper-index.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "| pythia-" in line]
    assert len(rows) == 10
    for model, arm, weights, *columns in rows:
        stored = paper_table(model)[arm]
        assert float(weights.removesuffix("M")) * 1e6 == pytest.approx(stored["trainable_parameters"])
        assert [float(column) for column in columns] == [stored[name] for name in COLUMNS]
