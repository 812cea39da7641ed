"""The notebooks run from top to bottom on the embedded model, with few steps."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[2] / "notebooks"


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.ipynb")))
def test_every_cell_runs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PRESKIP_NOTEBOOK_STEPS", "2")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # what a notebook writes
    notebook = nbformat.read(FOLDER / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "stored without outputs"
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    printed = "".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "")
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    expected = {"insert_train_look.ipynb": "bits_per_byte", "bring_your_own_model.ipynb": "preskip − none"}
    assert expected[name] in printed
