"""The figure of quality against cost: what stands where, and that base and merged LoRA are on it."""

import json
import re
import sys
from pathlib import Path

import pytest

from preskip import PreskipError
from scripts import load_script

ROOT = Path(__file__).parents[2]
RUN, STORED = ROOT / "results" / "standard-wikitext2", ROOT / "results" / "cheap-forms"
PICTURE = ROOT / "docs" / "cheap-forms.svg"


def ratio(value):
    return {"ratio": value, "ratio_low": value - 0.01, "ratio_high": value + 0.01}


BENCH = {"work": [{"work": "decode", "rows": {"base": {}, "optimized": ratio(1.2), "lora-merged": ratio(1.0),
                                              "skip": ratio(1.05), "int8": ratio(1.1)}}]}  # fmt: skip


@pytest.fixture(scope="module")
def script():
    return load_script("cost_figure")


def test_cost_and_quality_of_each_form(script):
    results = json.loads((RUN / "results.json").read_text())
    price = {"set": "wikitext2", "metric": "bits_per_byte", "arm": "preskip-int8", "reference": "none"}
    results["comparisons"].append({**price, "difference": -0.1, "low": -0.2, "high": -0.05})
    found = {point["arm"]: point for point in script.points(BENCH, results, "wikitext2")}
    assert set(found) == {"base", "preskip", "LoRA, merged", "skip", "preskip, int8"}
    assert (found["base"]["x"], found["base"]["y"]) == (1.0, 0.0)
    assert (found["preskip"]["x"], found["LoRA, merged"]["x"]) == (1.2, 1.0)
    assert found["preskip"]["y"] == pytest.approx(-0.1035, abs=1e-4)
    assert found["preskip, int8"] == {
        "arm": "preskip, int8", "x": 1.1, "x_low": 1.09, "x_high": 1.11, "y": -0.1, "y_low": -0.2, "y_high": -0.05,
    }  # fmt: skip
    with pytest.raises(PreskipError, match="bits per byte on 'news' are not compared"):
        script.points(BENCH, results, "news")
    with pytest.raises(PreskipError, match="name one with --set"):
        script.points(BENCH, results)
    with pytest.raises(PreskipError, match="no decoding"):
        script.points({"work": []}, results, "wikitext2")


def test_it_is_drawn(script, tmp_path, monkeypatch):
    pytest.importorskip("vl_convert")
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    files = [str(tmp_path / "cost.svg"), str(tmp_path / "bench.json"), str(RUN / "results.json")]
    monkeypatch.setattr(sys, "argv", ["x", *files, "--set", "wikitext2"])
    script.main()
    svg = (tmp_path / "cost.svg").read_text()
    for word in ("base", "LoRA, merged", "preskip", "Time per decoded token"):
        assert word in svg


def test_page_and_picture_are_those_of_the_stored_files(script):
    pytest.importorskip("vl_convert")
    bench, quality = (json.loads((STORED / f"{name}.json").read_text()) for name in ("bench", "quality"))
    again = "run benchmarks/cost_figure.py again"
    assert script.table(bench, quality) in (ROOT / "docs" / "bench.md").read_text(encoding="utf-8"), again
    records = script.points(bench, quality)
    assert {record["arm"] for record in records} == {
        "base", "preskip", "preskip, int8", "LoRA, merged", "skip", "preskip-lowrank-narrow", "preskip-bottleneck",
        "preskip-third-narrow", "preskip-late-narrow",
    }  # fmt: skip
    words = [re.findall(r">([^<>]+)</(?:text|tspan)>", svg) for svg in (script.draw(records), PICTURE.read_text())]
    assert words[0] == words[1], again
