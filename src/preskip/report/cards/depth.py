"""The depth figure of a model card: the branch of one arm and seed by layer, as a picture and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preskip.runs.schema import Results, Trend
from preskip.stats.trends import null_band

DPI = 170
SIZES = {
    "skip_to_attention": "Size of the skip over that of attention",
    "enrichment": "Size of the enrichment over that of what attention read before",
}
NORM = "Norm of the skip's weights"
TRENDS = {
    "later more": "it grows with depth",
    "later less": "it shrinks with depth",
    "no trend": "it has no trend over depth",
    "undecided": "a trend over depth is neither shown nor excluded",
}

Layers = Sequence[Mapping[str, Any]]


def depth_layers(results: Results, arm: str, seed: int) -> list[dict[str, Any]]:
    """The stored depth profile in the form of explain.json's layers; none where nothing of a branch was measured."""
    rows: Any = (results.get("depth") or {}).get(arm, {}).get(str(seed)) or []
    noise = ((results.get("nulls") or {}).get("noise") or {}).get(arm) or ()
    bands = {row["layer"]: row for row in null_band(noise)}
    has_skip = any(row["skip_norm"] for row in rows)
    sizes = [key for key in SIZES if any(row.get(key) for row in rows)]  # 0 in every layer: a part that the arm lacks
    layers = [
        {
            "layer": row["layer"],
            **{key: _interval(row, key) if key in sizes else None for key in SIZES},
            "skip_norm": row["skip_norm"] if has_skip else None,
            "null": {"skip_norm": bands[row["layer"]]} if row["layer"] in bands else None,
        }
        for row in rows
    ]
    return layers if has_skip or sizes else []


def _interval(row: Mapping[str, Any], key: str) -> dict[str, float] | None:
    """A size and its interval; without one, where there were too few documents, the value alone."""
    value = row.get(key)
    if value is None:
        return None
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    return {"value": value, "low": value if low is None else low, "high": value if high is None else high}


def depth_picture(layers: Layers) -> bytes | None:
    """The figure as PNG; None without layers, or where the extra `report` is not installed."""
    try:
        import altair  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError:
        return None
    from preskip.report.explain.figures import depth_figures
    from preskip.report.pictures import picture, to_png

    return to_png(picture(depth_figures(layers), columns=3), DPI) if layers else None


def depth_words(layers: Layers, trends: Sequence[Trend]) -> str:
    """What the figure shows, for those who do not see it; the trends are of all seeds together."""
    found = {row["measure"]: row for row in trends}
    points = {key: [(row[key]["value"], row["layer"]) for row in layers if row[key]] for key in SIZES}
    norms = [(row["skip_norm"], row["layer"]) for row in layers if row["skip_norm"] is not None]
    sentences = [_sentence(SIZES[key], own, found.get(key)) for key, own in points.items() if own]
    if norms:
        sentences.append(_sentence(NORM, norms, found.get("skip_norm"), _beside_noise(layers)))
    return " ".join(sentences)


def _sentence(what: str, points: Sequence[tuple[float, int]], trend: Trend | None, more: str = "") -> str:
    (low, first), (high, last) = min(points), max(points)
    parts = [f"{what} by layer: from {low:.3g} in layer {first} to {high:.3g} in layer {last}", more]
    if trend is not None:
        seeds = f"{trend['seeds']} seed{'s' if trend['seeds'] > 1 else ''}"
        parts.append(
            f"{TRENDS[trend['verdict']]} (rank correlation with depth {trend['rho']:+.2f}, 95 % interval "
            f"{trend['low']:+.2f} to {trend['high']:+.2f}, {seeds})"
        )
    return "; ".join(filter(None, parts)) + "."


def _beside_noise(layers: Layers) -> str:
    """In how many layers the norm lies above what training on noise gives."""
    pairs = [(row["skip_norm"], row["null"]["skip_norm"]) for row in layers if row["null"]]
    above = sum(norm > band["high"] for norm, band in pairs)
    return f"above the 95 % band of the noise null in {above} of {len(pairs)} layers" if pairs else ""
