"""The price of cheap forms, from a probe to the table, on a tiny model."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from preskip.evaluate.adapters import load_adapter
from preskip.experiment.cell import opened
from preskip.experiment.run import finish_run, start_run
from scripts import load_script
from small_probe import small_probe

ROOT = Path(__file__).parents[2]
ARMS = ("none", "preskip", "lora", "preskip-bottleneck", "skip")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    options = {"arms": ARMS, "lr_mode": "default", "last_word_items": 0, "learning_rates": {"preskip": 0.3}}
    directory = start_run(small_probe(folder, **options), folder / "run", [])
    finish_run(directory, quiet=True)
    return folder / "run"


@pytest.fixture(scope="module")
def quality(run):
    return load_script("cheap_forms").measure(run)


def test_arms_are_compared_as_the_run_compares_them(run, quality):
    stored = json.loads((run / "results.json").read_text())["comparisons"]
    wanted = {entry["arm"]: entry for entry in stored if entry["reference"] == "none"}
    found = {entry["arm"]: entry for entry in quality["comparisons"] if entry["reference"] == "none"}
    assert set(found) == {*ARMS[1:], "preskip-int8"}
    for arm in ARMS[1:]:
        assert found[arm] == {key: wanted[arm][key] for key in found[arm]}
    assert quality["weights"]["preskip-int8"] == quality["weights"]["preskip"] == 2 * int(3.5 * 32**2)
    assert quality["seeds"] == [1, 2]


def test_int8_is_scored_with_each_weight_rounded_to_127_steps_of_its_row(run, quality):
    price = next(entry for entry in quality["comparisons"] if "margin" in entry)
    assert (price["arm"], price["reference"], price["margin"]) == ("preskip-int8", "preskip", 0.002)
    prepared = opened(run)
    nats, size = {"plain": 0.0, "rounded": 0.0}, 0
    for seed in (1, 2):
        live = load_adapter(prepared.base, prepared.run.cell("preskip", seed).adapter)
        for kind in nats:
            if kind == "rounded":
                with torch.no_grad():
                    for name, weight in live.named_parameters():
                        if ".preskip." in name:
                            step = weight.abs().amax(1, keepdim=True) / 127
                            weight.copy_((weight / step).round() * step)
            records = prepared.heldout.score(live, prepared.tokenizer, kind, batch_tokens=None, quiet=True)
            nats[kind] += sum(row["nll"] for row in records)
        size += sum(row["bytes"] for row in records)
        live.unload()
    wanted = (nats["rounded"] - nats["plain"]) / size / math.log(2)
    assert abs(wanted) > 1e-5
    assert price["difference"] == pytest.approx(wanted, rel=0.02)
    assert price["low"] <= price["difference"] <= price["high"]


def test_of_an_unfinished_run_the_seeds_with_all_arms_are_taken(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "arms" / "skip" / "seed-2" / "cell.json").unlink()
    found = load_script("cheap_forms").measure(tmp_path / "run")
    assert found["seeds"] == [1]
    assert {entry["covers"] for entry in found["comparisons"]} == {"documents only"}
    shutil.rmtree(tmp_path / "run" / "arms" / "skip")
    with pytest.raises(SystemExit, match="no seed of which all arms are done"):
        load_script("cheap_forms").measure(tmp_path / "run")


def test_the_table_has_price_and_cost_of_each_form(quality):
    cost = {"ratio": 1.2, "ratio_low": 1.1, "ratio_high": 1.3, "ratio_owed": 1.256}
    rows = {"optimized": cost, "int8": cost, "lora-merged": cost, "bottleneck": cost, "skip": cost}
    lines = load_script("cost_figure").table({"work": [{"work": "decode", "rows": rows}]}, quality).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        *(f"| `{arm}`" for arm in ARMS[1:]),
        "| `preskip` baked to int8",
    ]
    assert all(line.endswith("| 1.20 (1.10 to 1.30) | 1.256 |") for line in lines[2:])
    assert lines[2].split(" | ")[4] == "–"  # preskip has no price over itself
