"""The study of the branch's compute dtype at tiny sizes: what both kinds compute, and that small steps move weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from preskip import PreskipBranch
from scripts import load_script
from tiny_model import save_tiny_llama, write_corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    return load_script("branch_dtype")


def test_products_in_float32_are_those_of_the_weights_themselves(script):
    torch.manual_seed(0)
    branch = PreskipBranch(60, init_weights="paper", init_std=0.1, skip_init_std=0.1)
    x = torch.randn(3, 63, 60).bfloat16()
    with script.float32_products():
        enriched, skip = branch(x)
    inner = F.silu(x.float() @ branch.up.weight.T)
    wanted = (x.float() + inner @ branch.down.weight.T).bfloat16()
    torch.testing.assert_close(enriched, wanted, rtol=0, atol=0)
    torch.testing.assert_close(skip, (wanted.float() @ branch.skip.weight.T).bfloat16(), rtol=0, atol=0)
    other, _ = branch(x)
    assert not torch.equal(other, enriched)


def test_differences_are_held_against_the_spread_between_seeds(script):
    found = script.summary([1.0, 1.2, 1.1], [1.05, 1.2, 1.05])
    assert found["differences"] == pytest.approx([-0.05, 0.0, 0.05])
    assert found["deviation_between_seeds"] == pytest.approx(0.1)
    assert found["within"]
    assert not script.summary([1.0, 1.2, 1.1], [1.15, 1.2, 1.1])["within"]


def test_the_study(script, tmp_path, monkeypatch, capsys):
    model = save_tiny_llama(tmp_path / "model")
    corpus = write_corpus(tmp_path / "corpus.jsonl", 20)
    seen: list[list[float]] = []
    real = script.Study.train
    monkeypatch.setattr(script.Study, "train", lambda self, *given: seen.append(real(self, *given)) or seen[-1])
    options = ["--model", model, "--corpus", corpus, "--seeds", "1,2", "--steps", "5", "--seq-len", "16"]
    options += ["--documents", "3", "--words", "20", "--learning-rate", "0.01"]
    monkeypatch.setattr(sys, "argv", ["branch_dtype.py", *map(str, options)])
    script.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, theirs, *_ = seen
    assert ours[0] == theirs[0]  # a branch begins as the identity in both
    assert ours != theirs
    assert found["loss_of_last_steps"]["bfloat16"][0] == pytest.approx(sum(ours) / 5)
    assert found["largest_difference_of_a_step"] >= max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert found["interval"]["difference"] == pytest.approx(found["bits_per_byte"]["mean_difference"], abs=1e-6)
    assert found["moved_share"]["share"] > 0.99


def test_one_seed_has_no_spread(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["branch_dtype.py", "--seeds", "1"])
    with pytest.raises(SystemExit):
        script.main()
    assert "--seeds needs two or more" in capsys.readouterr().err


def test_the_page_has_the_stored_figures(script):
    found = json.loads((ROOT / "results" / "branch-dtype" / "smollm2.json").read_text())
    log, bench = ((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("lab-log", "bench"))
    for key in ("loss_of_last_steps", "bits_per_byte"):
        own = found[key]
        assert script.summary(own["bfloat16"], own["float32"]) == own
        shown = [f"+{difference:.4f}" for difference in own["differences"]]
        assert f"| {' | '.join(shown)} | {own['deviation_between_seeds']:.3f} |" in log
    for page in (log, bench):
        words = " ".join(page.split())
        low, high = (f"{found['interval'][key]:+.4f}".replace("-", "−") for key in ("low", "high"))
        assert f"{found['interval']['difference']:+.4f} [{low}, {high}]" in words
    assert found["moved_share"]["share"] > 0.99
