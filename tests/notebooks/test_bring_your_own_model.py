"""The notebook bring_your_own_model runs on the embedded model, with few steps."""

import pytest

pytest.importorskip("nbclient")

from running import run_notebook


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.timeout(900)
def test_every_cell_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PRESKIP_NOTEBOOK_STEPS", "2")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # what a notebook writes
    assert "preskip − none" in run_notebook("bring_your_own_model.ipynb", tmp_path)
