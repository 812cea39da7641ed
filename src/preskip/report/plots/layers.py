"""Measures of the branch by layer: lines with their intervals, bars, and the singular values of the skip."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from preskip.report.plots.base import Record, Spec, dashes, once, specification, tooltips

Layer = Mapping[str, Any]
Interval = Mapping[str, float]


def interval_records(layers: Sequence[Layer], series: Mapping[str, Callable[[Layer], Interval | None]]) -> list[Record]:
    """One record per series and layer: value with its limits; layers without the measure are left out.

    Args:
        layers: as in explain.json.
        series: name → where the interval stands in a layer.
    """
    return [
        {"series": name, "layer": layer["layer"], **{key: found[key] for key in ("value", "low", "high")}}
        for name, find in series.items()
        for layer in layers
        for found in [find(layer)]
        if found is not None
    ]


def profile(records: Sequence[Record], title: str, *, series: Sequence[str] = (), form: str = ".4g") -> Spec:
    """Lines by layer with their intervals as bands, around a line at 0.

    Args:
        records: as from `interval_records`.
        title: of the vertical axis.
        series: all names in order, for the colour.
        form: of the numbers in the tooltip.
    """
    import altair as alt

    names = list(series) or list(dict.fromkeys(record["series"] for record in records))
    legend = alt.Legend(symbolOpacity=1) if len({record["series"] for record in records}) > 1 else None
    source = alt.Chart(alt.InlineData(values=list(records)))
    colour = alt.Color("series:N", title=None, legend=legend, scale=alt.Scale(domain=names, range="category"))
    base = source.encode(x=layer_axis(), color=colour)
    dash = alt.StrokeDash("series:N", title=None, legend=legend, scale=alt.Scale(domain=names, range=dashes(names)))
    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=True, nice=True))
    about = tooltips({"series:N": "what", "layer:Q": "layer"})
    about += tooltips({"value:Q": "value", "low:Q": "from", "high:Q": "to"}, form)
    layers = [
        base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q"), y2="high:Q"),
        once(source).mark_rule(strokeWidth=1.25, strokeDash=[4, 3]).encode(y=alt.datum(0)),
        base.mark_line(strokeWidth=2).encode(y=y, strokeDash=dash),
        base.mark_point(filled=True, size=34, opacity=1).encode(y=y, tooltip=about),
    ]
    return specification(alt.layer(*layers), height=230)


def bars(records: Sequence[Record], title: str, domain: tuple[float, float], series: Sequence[str]) -> Spec:
    """Bars by layer from 0 with their intervals; pale where the interval includes 0.

    Args:
        records: as from `interval_records`, of one series.
        title: of the vertical axis.
        domain: its limits, shared by plots that are to be compared.
        series: all names in order, for the colour.
    """
    import altair as alt

    source = alt.Chart(
        alt.InlineData(values=[{**record, "clear": record["low"] * record["high"] > 0} for record in records])
    )
    shade = alt.Scale(domain=list(series), range="category")
    width = max(3, min(14, 150 // max(1, len(records))))
    y = alt.Y("value:Q", title=title, scale=alt.Scale(domain=list(domain), nice=False))
    about = tooltips({"layer:Q": "layer"}) + tooltips({"value:Q": "when off", "low:Q": "from", "high:Q": "to"}, "+.5f")
    layers = [
        source.mark_bar(size=width).encode(
            x=layer_axis(padding=10),
            y=y,
            y2=alt.datum(0),
            color=alt.Color("series:N", scale=shade, legend=None),
            opacity=alt.condition("datum.clear", alt.value(0.7), alt.value(0.25)),
            tooltip=about,
        ),
        source.mark_rule(strokeWidth=1.5, style="strong").encode(
            x=layer_axis(padding=10), y="low:Q", y2="high:Q", tooltip=about
        ),
        once(source).mark_rule(strokeWidth=1.25).encode(y=alt.datum(0)),
    ]
    return specification(alt.layer(*layers), height=210)


def bounds(records: Sequence[Record]) -> tuple[float, float]:
    """Limits of an axis that holds 0 and all intervals, with a twentieth to spare."""
    low = min([0.0, *(record["low"] for record in records)])
    high = max([0.0, *(record["high"] for record in records)])
    spare = 0.05 * (high - low) or 0.01
    return (low - spare if low < 0 else 0.0), high + spare


def spectrum_records(layers: Sequence[Layer]) -> list[Record]:
    """One record per layer and singular value of the skip, the largest first, to 4 digits."""
    return [
        {"layer": layer["layer"], "index": index, "value": float(f"{value:.4g}")}
        for layer in layers
        for index, value in enumerate(layer.get("spectrum") or (), start=1)
        if value > 0
    ]


def spectrum(records: Sequence[Record]) -> Spec:
    """Singular values of the skip on a logarithmic axis, one line per layer, shaded by depth."""
    import altair as alt

    source = alt.Chart(alt.InlineData(values=list(records)))
    scale = alt.Scale(range="ramp", nice=False, interpolate="rgb")
    legend = alt.Legend(titleOrient="left")
    y = alt.Y(
        "value:Q",
        title="Singular value",
        scale=alt.Scale(type="log", nice=False),
        axis=alt.Axis(tickCount=4, format="~g"),
    )
    x = alt.X("index:Q", title="Rank", axis=alt.Axis(grid=False, tickCount=6, format="d"), scale=alt.Scale(nice=False))
    line = source.encode(
        x=x, y=y, detail="layer:Q", color=alt.Color("layer:Q", title="layer", scale=scale, legend=legend)
    )
    about = tooltips({"layer:Q": "layer", "index:Q": "rank"}) + tooltips({"value:Q": "singular value"}, ".4g")
    drawn = [
        line.mark_line(strokeWidth=1.5, opacity=0.9),
        line.mark_point(filled=True, size=40, opacity=0).encode(tooltip=about),
    ]
    return specification(alt.layer(*drawn), height=250)


def layer_axis(*, padding: float = 0) -> Any:
    """The horizontal channel of the field `layer`, with `padding` pixels at both ends."""
    import altair as alt

    axis = alt.Axis(grid=False, tickMinStep=1, format="d")
    return alt.X("layer:Q", title="Layer", axis=axis, scale=alt.Scale(nice=False, padding=padding, zero=False))
