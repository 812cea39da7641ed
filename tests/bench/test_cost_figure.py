"""The figure of quality against cost: what stands where, and that base and merged LoRA are on it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ROOT / "results" / "standard-wikitext2"


def ratio(value):
    return {"ratio": value, "ratio_low": value - 0.01, "ratio_high": value + 0.01}


BENCH = {"work": [{"work": "decode", "rows": {"base": {}, "optimized": ratio(1.2), "lora-merged": ratio(1.0),
                                              "skip": ratio(1.05), "int8": ratio(1.1)}}]}  # fmt: skip


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("cost_figure", ROOT / "benchmarks" / "cost_figure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cost_and_quality_of_each_form(script):
    results = json.loads((RUN / "results.json").read_text())
    price = {
        "comparisons": [{"set": "wikitext2", "metric": "bits_per_byte", "difference": 0.001, "low": 0, "high": 0.002}]
    }
    found = {point["arm"]: point for point in script.points(BENCH, results, "wikitext2", price)}
    assert set(found) == {"base", "preskip", "LoRA, merged", "skip", "preskip, int8"}
    assert (found["base"]["x"], found["base"]["y"]) == (1.0, 0.0)
    assert (found["preskip"]["x"], found["LoRA, merged"]["x"]) == (1.2, 1.0)
    assert found["preskip"]["y"] == pytest.approx(-0.1035, abs=1e-4)
    assert found["preskip, int8"]["y"] == pytest.approx(found["preskip"]["y"] + 0.001)
    with pytest.raises(ValueError, match="does not compare bits per byte on 'news'"):
        script.points(BENCH, results, "news", None)


def test_it_is_drawn(script, tmp_path, monkeypatch):
    pytest.importorskip("vl_convert")
    (tmp_path / "bench.json").write_text(json.dumps(BENCH))
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "cost.svg"), str(tmp_path / "bench.json"), str(RUN)])
    script.main()
    svg = (tmp_path / "cost.svg").read_text()
    for word in ("base", "LoRA, merged", "preskip", "Time per decoded token"):
        assert word in svg
