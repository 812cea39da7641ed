"""The notebook bring_your_own_model on a model in a folder, with few steps; the other runs the embedded model."""

import pytest

from running import run_notebook
from tiny_model import save_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_every_cell_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PRESKIP_NOTEBOOK_MODEL", str(save_tiny_llama(tmp_path / "model", max_position_embeddings=2048)))
    printed = run_notebook("bring_your_own_model.ipynb", tmp_path, monkeypatch)
    assert "preskip − none" in printed
    assert "llama: 2 attentions, e.g. model.layers.0.self_attn" in printed
