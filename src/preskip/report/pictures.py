"""Charts of the page as pictures for paper: side by side, 6.75 inches wide, as SVG, PDF or PNG."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 6.75  # inches: both columns of a page
LAYOUT = 900  # the same in pixels as charts are laid out, so that 15 of them are 8 points
PANEL_MARGIN = 70  # pixels beside a chart, for its axis
INK, GREY = "#111827", "#6b7280"
# Okabe and Ito's palette, which colour-blind readers tell apart.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1f2937", GREY]
TEXT = {"labelColor": INK, "titleColor": INK, "labelFontSize": 13}
CONFIG = {
    "aria": False,
    "background": "white",
    "font": "DejaVu Sans, sans-serif",
    "view": {"stroke": None},
    "title": {"fontSize": 15, "anchor": "start", "color": INK, "offset": 10},
    "axis": {**TEXT, "titleFontSize": 14, "titleFontWeight": "normal", "gridColor": "#e5e7eb", "domainColor": INK}
    | {"tickColor": INK, "labelOverlap": True, "labelFlush": False},
    "legend": {**TEXT, "orient": "top", "titleFontSize": 13, "symbolType": "stroke", "symbolStrokeWidth": 2.5},
    "style": {"strong": {"stroke": INK}, "hollow": {"fill": "white"}},
    "point": {"stroke": "white", "strokeWidth": 1},  # marks that overlap stay apart
    "rule": {"color": GREY},
    "text": {"color": GREY},
    "range": {
        "category": COLOURS,
        "ordinal": [COLOURS[2], COLOURS[1], COLOURS[0], GREY, GREY],
        "ramp": ["#00224e", "#7d7c78", "#fee838"],
        "heatmap": ["#f7fbff", "#6baed6", "#08306b"],
    },
}


def picture(
    figures: Sequence[Mapping[str, Any]], *, columns: int = 2, height: int | None = None, shared: bool = False
) -> str:
    """Charts as one SVG, the same for the same charts.

    Args:
        figures: with title and spec, as the page's.
        columns: charts in a row.
        height: of each chart in pixels of 900 in 6.75 inches; None for its own.
        shared: whether one legend stands for all of them.
    """
    import vl_convert
    from altair import SCHEMA_URL

    columns = min(columns, len(figures))
    size = {"width": LAYOUT / columns - PANEL_MARGIN, **({"height": height} if height else {})}
    panels = []
    for figure in figures:  # without the layers that only a pointer finds
        layers = [layer for layer in figure["spec"]["layer"] if layer["mark"].get("opacity") != 0]
        panels.append({**figure["spec"], "layer": layers, "title": figure["title"], **size})
    spec = {"$schema": SCHEMA_URL, "concat": panels, "columns": columns, "spacing": 24, "config": CONFIG}
    channels = ("color", "fill", "stroke", "shape", "strokeDash")
    spec["resolve"] = {"scale": dict.fromkeys(channels, "shared" if shared else "independent")}
    svg = vl_convert.vegalite_to_svg(spec)
    # Vega numbers clips and gradients on from one picture to the next.
    for place, name in enumerate(dict.fromkeys(re.findall(r'id="((?:clip|gradient_)\d+)"', svg))):
        svg = re.sub(rf"\b{name}\b", f"part-{place}", svg)
    found = re.search(r'width="([\d.]+)" height="([\d.]+)"', svg)
    assert found
    inches = f'width="{WIDTH}in" height="{WIDTH * float(found[2]) / float(found[1]):.4f}in"'
    return svg.replace(found[0], inches, 1)


def to_png(svg: str, dpi: int = 300) -> bytes:
    """A picture as PNG with so many pixels per inch."""
    import vl_convert

    return vl_convert.svg_to_png(svg, ppi=dpi * 72 / 96)  # it takes an SVG's inch of 96 pixels for 96 points


def to_pdf(svg: str) -> bytes:
    """A picture as PDF; svg2pdf orders its objects by chance, so that the bytes differ from one call to the next."""
    import vl_convert

    return vl_convert.svg_to_pdf(svg)
