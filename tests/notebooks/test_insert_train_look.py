"""The notebook insert_train_look on a model in a folder, with few steps; in its own file: both run side by side.

The same commands on the embedded model: tests/cli/test_embedded_probe.py and tests/docs/test_blocks.py.
"""

import pytest

from running import run_notebook
from tiny_model import save_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_every_cell_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PRESKIP_NOTEBOOK_MODEL", str(save_tiny_llama(tmp_path / "model", max_position_embeddings=2048)))
    printed = run_notebook("insert_train_look.ipynb", tmp_path, monkeypatch)
    assert "bits_per_byte" in printed
    assert "PreskipLlamaForCausalLM" in printed
