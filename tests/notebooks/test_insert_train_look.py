"""The notebook insert_train_look, with few steps; in its own file, so that both notebooks run side by side."""

import pytest

from running import run_notebook

pytestmark = [pytest.mark.slow, pytest.mark.embedded, pytest.mark.timeout(900)]


def test_every_cell_runs(tmp_path, monkeypatch):
    assert "bits_per_byte" in run_notebook("insert_train_look.ipynb", tmp_path, monkeypatch)
