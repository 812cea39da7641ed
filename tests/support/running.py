"""Run a notebook from top to bottom."""

import ast
import io
import json
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"


def run_notebook(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every cell with 2 training steps of 2 sequences, in `place`; what they print, and the values of expressions.

    In this process: a kernel would import all libraries again.
    """
    monkeypatch.setenv("PRESKIP_NOTEBOOK_STEPS", "2")
    monkeypatch.setenv("PRESKIP_NOTEBOOK_BATCH", "2")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setattr(tempfile, "tempdir", str(place))  # what a notebook writes
    monkeypatch.chdir(place)

    cells = json.loads((FOLDER / name).read_text())["cells"]
    assert any(cell.get("outputs") for cell in cells), "stored without outputs"
    scope: dict = {}
    with redirect_stdout(io.StringIO()) as printed:
        for cell in cells:
            if cell["cell_type"] == "code":
                statements = ast.Interactive(ast.parse("".join(cell["source"])).body)
                exec(compile(statements, name, "single"), scope)
    return printed.getvalue()
