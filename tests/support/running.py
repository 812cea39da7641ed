"""Run a notebook from top to bottom."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"


def run_notebook(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every cell with 2 training steps of 2 sequences, in `place`; what they printed and showed as text."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PRESKIP_NOTEBOOK_STEPS", "2")
    monkeypatch.setenv("PRESKIP_NOTEBOOK_BATCH", "2")
    monkeypatch.setenv("TMPDIR", str(place))  # what a notebook writes

    notebook = nbformat.read(FOLDER / name, as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells), "stored with outputs"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    place_of = {"metadata": {"path": str(place)}}
    nbclient.NotebookClient(
        notebook, timeout=600, startup_timeout=300, kernel_name="python3", resources=place_of
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in outputs)
