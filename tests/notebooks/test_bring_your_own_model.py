"""The notebook bring_your_own_model, with few steps; in its own file, so that both notebooks run side by side."""

import pytest

from running import run_notebook

pytestmark = [pytest.mark.slow, pytest.mark.embedded, pytest.mark.timeout(900)]


def test_every_cell_runs(tmp_path, monkeypatch):
    assert "preskip − none" in run_notebook("bring_your_own_model.ipynb", tmp_path, monkeypatch)
