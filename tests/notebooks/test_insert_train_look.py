"""The notebook insert_train_look runs on the embedded model, with few steps."""

import pytest

pytest.importorskip("nbclient")

from running import run_notebook


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.timeout(900)
def test_every_cell_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PRESKIP_NOTEBOOK_STEPS", "2")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # what a notebook writes
    assert "bits_per_byte" in run_notebook("insert_train_look.ipynb", tmp_path)
