"""Every part of `make gpu` at small sizes on the CPU, and that a part which fails says so and leaves the others be."""

import json
import sys
from pathlib import Path

import pytest
import torch

from scripts import load_script

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def script():
    return load_script("gpu")


PARTS = ["parity", "adapter", "architecture", "training", "scoring", "ddp", "bench", "probe"]


def test_every_part_is_tried(script):
    assert set(PARTS) == set(script.PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_the_part(part, script):
    entry = script.run_part(part, torch.device("cpu"), tiny=True)
    assert entry["ok"], entry
    if part == "bench":
        (shape,) = entry["found"].values()
        assert not shape["left_out"]
        assert not any(work["left_out"] for work in shape["work"])
    json.dumps(entry)


def test_a_part_that_fails_says_so_and_the_others_go_on(script, monkeypatch, capsys):
    monkeypatch.setitem(script.PARTS, "parity", lambda device, tiny: script.require(False, "off by 2"))
    monkeypatch.setitem(script.PARTS, "ddp", lambda device, tiny: {"gradient_error": 0.0})
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--parts", "parity,ddp"])
    with pytest.raises(SystemExit) as end:
        script.main()
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (end.value.code, first["ok"], second["ok"]) == (1, False, True)
    assert first["error"].startswith("AssertionError: off by 2 (gpu.py:")
