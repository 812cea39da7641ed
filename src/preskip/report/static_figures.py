"""Figures for papers from explain.json: depth, ablation, token classes, spectrum; each as SVG, PDF and PNG.

One style for all: the width of a two-column page, 8-point text, colours that a colour-blind reader tells apart, bands
and bars for 95 % intervals over documents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from preskip.errors import PreskipError
from preskip.runs.files import clear_disk_errors

FORMATS = ("svg", "pdf", "png")
WIDTH = 6.75  # inches
# Okabe and Ito's palette.
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#6b7280"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.25,
    "lines.markersize": 3,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # text stays text
    "axes.formatter.limits": (-3, 4),
    "svg.hashsalt": "preskip",  # the same file each time
}
SIZES = {
    "skip_to_attention": ("‖skip‖ / ‖attention‖", BLUE),
    "enrichment": ("‖x̃ − x̂‖ / ‖x̂‖", ORANGE),
}
ABLATIONS = {"skip": ("skip off", BLUE), "enrichment": ("enrichment off", ORANGE), "both": ("both off", GREEN)}
DIMENSIONS = {
    "frequency": "Frequency",
    "position": "Place in the word",
    "repeat": "In context",
    "kind": "Kind",
    "case": "Case",
    "word": "Word",
}

Explain = Mapping[str, Any]
Layers = Sequence[Mapping[str, Any]]


def check_folder(folder: Path) -> None:
    """Refuse what `save_figures` could not do, before anything is computed.

    Raises:
        PreskipError: the folder is a file, or matplotlib is not installed.
    """
    if folder.exists() and not folder.is_dir():
        raise PreskipError(f"--figures {folder} is a file: give a folder")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PreskipError("--figures needs matplotlib: pip install 'preskip[report]'") from None


def save_figures(explain: Explain, folder: Path) -> list[Path]:
    """Write every figure for which something was measured.

    Args:
        explain: content of explain.json.
        folder: made if absent; files of the same names are replaced.

    Returns:
        The files, e.g. depth.svg, depth.pdf, depth.png.

    Raises:
        PreskipError: see `check_folder`; or the folder cannot be written.
    """
    check_folder(folder)
    import matplotlib as mpl

    drawn: dict[str, Callable[[Explain], Any]] = {
        "depth": depth,
        "ablation": ablation,
        "classes": classes,
        "spectrum": spectrum,
    }
    written = []
    with mpl.rc_context(STYLE), clear_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in drawn.items():
            figure = draw(explain)
            for kind in FORMATS if figure is not None else ():
                path = folder / f"{name}.{kind}"
                # Without the date, so that the same numbers give the same file.
                figure.savefig(path, metadata={"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind))
                written.append(path)
    return written


def depth(explain: Explain) -> Any:
    """Functional size of each part by layer with its interval, and the skip's norm on the band of its noise null."""
    layers = explain["layers"]
    panels: list[tuple[str, Callable[[Any], None]]] = [
        (title, partial(_profile, layers, key, colour))
        for key, (title, colour) in SIZES.items()
        if any(row[key] for row in layers)
    ]
    if any(row["skip_norm"] is not None for row in layers):
        panels.append(("‖W_skip‖ (Frobenius)", partial(_norm, layers)))
    if not panels:
        return None
    figure, all_axes = _figure(1, len(panels), 2.1)
    for axes, (title, draw) in zip(all_axes, panels, strict=True):
        draw(axes)
        axes.set_title(title)
        axes.set_xlabel("layer")
        _from_zero(axes)
        _whole_numbers(axes)
    return figure


def ablation(explain: Explain) -> Any:
    """Bits per byte that switching off a part of one layer costs, with intervals over documents."""
    rows = [row for row in explain["layers"] if row["ablation"]]
    parts = [part for part in ABLATIONS if any(row["ablation"].get(part) for row in rows)]
    if not parts:
        return None
    figure, (axes,) = _figure(1, 1, 2.4)
    width = 0.8 / len(parts)
    for place, part in enumerate(parts):
        own = [(row["layer"], row["ablation"][part]) for row in rows if row["ablation"].get(part)]
        x = [layer + (place - (len(parts) - 1) / 2) * width for layer, _ in own]
        title, colour = ABLATIONS[part]
        axes.bar(x, [found["value"] for _, found in own], width, color=colour, alpha=0.75, label=title)
        axes.vlines(x, [f["low"] for _, f in own], [f["high"] for _, f in own], color="#111827", linewidth=0.7)
    axes.axhline(0, color="#111827", linewidth=0.6)
    axes.set_title("Loss when a part of one layer is switched off (above 0: it helps)")
    axes.set_ylabel("Δ bits per byte")
    axes.set_xlabel("layer")
    figure.legend(ncols=len(parts), loc="outside lower center")
    _whole_numbers(axes)
    return figure


def classes(explain: Explain) -> Any:
    """Both sizes for each class of tokens, all layers together, as dots with intervals."""
    rows = explain["classes"]
    keys = [key for key in SIZES if any(row[key] for row in rows)]
    if not keys:
        return None
    places: list[tuple[float, Mapping[str, Any]]] = []
    heads: list[tuple[float, str]] = []
    y = 0.0
    for dimension in dict.fromkeys(row["dimension"] for row in rows):
        heads.append((y, DIMENSIONS.get(dimension, dimension)))
        own = [row for row in rows if row["dimension"] == dimension]
        places += [(y + 1 + index, row) for index, row in enumerate(own)]
        y += 1.6 + len(own)
    figure, all_axes = _figure(1, len(keys), 0.13 * y + 0.6, sharey=True)
    for axes, key in zip(all_axes, keys, strict=True):
        title, colour = SIZES[key]
        found = [(place, row[key]) for place, row in places if row[key]]
        axes.hlines([p for p, _ in found], [f["low"] for _, f in found], [f["high"] for _, f in found], color=colour)
        axes.plot([f["value"] for _, f in found], [p for p, _ in found], "o", color=colour)
        axes.set_title(title)
        axes.set_xlim(0, 1.06 * axes.dataLim.x1 or 1)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
    first = all_axes[0]
    labels = [(place, f"{row['class']} ({row['tokens']:,})", "normal") for place, row in places]
    labels += [(place, head, "bold") for place, head in heads]
    first.set_yticks([place for place, _, _ in labels], [label for _, label, _ in labels])
    for tick, (_, _, weight) in zip(first.get_yticklabels(), labels, strict=True):
        tick.set_fontweight(weight)
    for axes in all_axes:
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    first.set_ylim(y - 0.6, -0.8)
    return figure


def spectrum(explain: Explain) -> Any:
    """Singular values of W_skip, a line per layer, and its two ranks by layer."""
    import matplotlib as mpl
    from matplotlib.ticker import MaxNLocator

    layers = [row for row in explain["layers"] if row["spectrum"] and row["effective_rank"] is not None]
    if not layers:
        return None
    figure, (left, right) = _figure(1, 2, 2.4)
    last = max(row["layer"] for row in layers)
    shades = mpl.colormaps["cividis"]
    scale = mpl.colors.Normalize(min(row["layer"] for row in layers), last)
    for row in layers:
        values = [value for value in row["spectrum"] if value > 0]
        left.plot(range(1, len(values) + 1), values, color=shades(scale(row["layer"])), linewidth=0.9)
    left.set_yscale("log")
    left.set_title("Singular values of W_skip")
    left.set_xlabel("rank")
    key = mpl.cm.ScalarMappable(scale, shades)
    figure.colorbar(key, ax=left, label="layer", aspect=30, pad=0.02, ticks=MaxNLocator(integer=True))
    x = [row["layer"] for row in layers]
    for rank, title, colour, mark in (
        ("effective_rank", "effective rank", BLUE, "o"),
        ("stable_rank", "stable rank", ORANGE, "s"),
    ):
        right.plot(x, [row[rank] for row in layers], marker=mark, color=colour, label=title)
    _from_zero(right)
    right.set_title("Directions that W_skip amounts to")
    right.set_xlabel("layer")
    right.legend()
    _whole_numbers(right)
    return figure


def _figure(rows: int, columns: int, height: float, **options: Any) -> tuple[Any, list[Any]]:
    """A figure without the state of pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def _profile(layers: Layers, key: str, colour: str, axes: Any) -> None:
    rows = [(row["layer"], row[key]) for row in layers if row[key]]
    x = [layer for layer, _ in rows]
    axes.fill_between(x, [f["low"] for _, f in rows], [f["high"] for _, f in rows], color=colour, alpha=0.22, lw=0)
    axes.plot(x, [f["value"] for _, f in rows], marker="o", color=colour)


def _norm(layers: Layers, axes: Any) -> None:
    rows = [row for row in layers if row["skip_norm"] is not None]
    bands = [(row["layer"], row["null"]["skip_norm"]) for row in rows if (row.get("null") or {}).get("skip_norm")]
    if bands:
        x = [layer for layer, _ in bands]
        limits = [b["low"] for _, b in bands], [b["high"] for _, b in bands]
        # With an edge: the band of noise may be thinner than a line.
        axes.fill_between(x, *limits, facecolor="#d1d5db", edgecolor=GREY, lw=0.8, label="noise null, 95 %")
    axes.plot([row["layer"] for row in rows], [row["skip_norm"] for row in rows], marker="o", color=GREEN)
    if bands:
        axes.legend(loc="lower right")


def _from_zero(axes: Any) -> None:
    """The vertical axis from 0 to a little above everything drawn, so that sizes can be compared."""
    axes.set_ylim(0, 1.12 * axes.dataLim.y1 or 1)


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
