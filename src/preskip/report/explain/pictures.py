"""Figures for papers from explain.json: depth, ablation, token classes, spectrum; each as SVG, PDF and PNG."""

from __future__ import annotations

from pathlib import Path

from preskip.errors import PreskipError
from preskip.report.render import require_extra
from preskip.runs.explain_schema import Explain
from preskip.runs.files import write_bytes

# Name: the section of the page that it holds, and how many of its charts stand in a row.
PICTURES = {
    "depth": ("explain-depth", 2),
    "ablation": ("explain-ablation", 3),
    "classes": ("explain-classes", 2),
    "spectrum": ("explain-weights", 2),
}


def check_folder(folder: Path) -> None:
    """Refuse what `save_figures` could not do, before anything is computed.

    Raises:
        PreskipError: the folder is a file, or the extra `report` is missing.
    """
    if folder.exists() and not folder.is_dir():
        raise PreskipError(f"--figures {folder} is a file: give a folder")
    require_extra()


def save_figures(explain: Explain, folder: Path) -> list[Path]:
    """Write every picture for which something was measured; the same numbers give the same SVG and PNG.

    Returns:
        The files, e.g. depth.svg, depth.pdf, depth.png; they replace older ones.

    Raises:
        PreskipError: see `check_folder`; or the folder cannot be written.
    """
    check_folder(folder)
    from preskip.report.explain.figures import explain_figures
    from preskip.report.pictures import picture, to_pdf, to_png

    figures, written = explain_figures(explain), []
    for name, (section, columns) in PICTURES.items():
        drawn = [figure for figure in figures if figure["section"] == section]
        if not drawn:
            continue
        svg = picture(drawn, columns=columns)
        for kind, content in (("svg", svg.encode()), ("pdf", to_pdf(svg)), ("png", to_png(svg))):
            write_bytes(folder / f"{name}.{kind}", content, mode=0o644)
            written.append(folder / f"{name}.{kind}")
    return written
