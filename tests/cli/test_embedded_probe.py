"""The real embedded model through the real command, with few steps."""

import json

import pytest

from commands import preskip


@pytest.mark.slow
@pytest.mark.embedded
def test_probe_of_the_embedded_model(embedded, tmp_path, capsys):
    options = ["--steps", "2", "--batch-size", "2", "--seq-len", "32", "--eval-documents", "4", "--eval-words", "60"]
    options += ["--last-word-items", "2", "--dtype", "float32", "--out", tmp_path / "run", "--json"]
    assert preskip("probe", *options) == 0
    results = json.loads(capsys.readouterr().out)
    counts = {name: arm["trainable_parameters"] for name, arm in results["arms"].items()}
    assert counts["preskip"] == 30 * int(3.5 * 576**2) == 34_836_480
    assert abs(counts["lora"] - counts["preskip"]) <= 0.005 * counts["preskip"]
    # SmolLM2-135M on English prose lies near one bit per byte; a broken model or tokenizer lies far off.
    assert 0.8 < results["arms"]["none"]["metrics"]["sotu"]["bits_per_byte"]["value"] < 1.3
    assert len(results["depth"]["preskip"]["42"]) == 30
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    assert manifest["model"]["sha256"].startswith("b179c9523d0e6a0f")
    assert (tmp_path / "run" / "report.html").is_file()
