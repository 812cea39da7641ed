"""Measures of the branch by layer: lines with their intervals, bars, and the singular values of the skip."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from preskip.report.plots.base import (
    POINT,
    Record,
    Spec,
    chart,
    colour,
    dash,
    layer_axis,
    once,
    specification,
    tooltips,
    value_axis,
    zero_line,
)
from preskip.runs.explain_schema import ExplainedLayer


def profile(records: Sequence[Record], title: str, *, series: Sequence[str] = (), form: str = ".4g") -> Spec:
    """Lines by layer with their intervals as bands, around a line at 0; `series` are all names, for the colour."""
    names = list(series) or list(dict.fromkeys(record["series"] for record in records))
    legend = alt.Legend(symbolOpacity=1) if len({record["series"] for record in records}) > 1 else None
    source = chart(records)
    base = source.encode(x=layer_axis(), color=colour(names, legend, "series"))
    y = value_axis("value", title)
    limits = {"value:Q": "value", "low:Q": "from", "high:Q": "to"}
    about = tooltips({"series:N": "what", "layer:Q": "layer"}, limits, form)
    layers = [
        base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q"), y2="high:Q"),
        zero_line(source),
        base.mark_line(strokeWidth=2).encode(y=y, strokeDash=dash(names, legend, "series")),
        base.mark_point(size=34, **POINT).encode(y=y, tooltip=about),
    ]
    return specification(layers, height=230)


def bars(records: Sequence[Record], title: str, domain: tuple[float, float], series: Sequence[str]) -> Spec:
    """Bars by layer from 0 with their intervals, pale where those include 0; plots to be compared share a `domain`."""
    source = chart([{**record, "clear": record["low"] * record["high"] > 0} for record in records])
    about = tooltips({"layer:Q": "layer"}, {"value:Q": "when off", "low:Q": "from", "high:Q": "to"}, "+.5f")
    base = source.encode(x=layer_axis(padding=10), tooltip=about)
    layers = [
        base.mark_bar(size=max(3, min(14, 150 // max(1, len(records))))).encode(
            y=value_axis("value", title, domain=list(domain), nice=False, zero=alt.Undefined),
            y2=alt.datum(0),
            color=colour(series, field="series"),
            opacity=alt.condition("datum.clear", alt.value(0.7), alt.value(0.25)),
        ),
        base.mark_rule(strokeWidth=1.5, style="strong").encode(y="low:Q", y2="high:Q"),
        once(source).mark_rule(strokeWidth=1.25).encode(y=alt.datum(0)),
    ]
    return specification(layers, height=210)


def bounds(records: Sequence[Record]) -> tuple[float, float]:
    """Limits of an axis that holds 0 and all intervals, with a twentieth to spare."""
    low = min([0.0, *(record["low"] for record in records)])
    high = max([0.0, *(record["high"] for record in records)])
    spare = 0.05 * (high - low) or 0.01
    return (low - spare if low < 0 else 0.0), high + spare


def spectrum_records(layers: Sequence[ExplainedLayer]) -> list[Record]:
    """One record per layer and singular value of the skip, the largest first, to 4 digits."""
    return [
        {"layer": layer["layer"], "index": index, "value": float(f"{value:.4g}")}
        for layer in layers
        for index, value in enumerate(layer.get("spectrum") or (), start=1)
        if value > 0
    ]


def spectrum(records: Sequence[Record]) -> Spec:
    """Singular values of the skip on a logarithmic axis, one line per layer, shaded by depth."""
    scale = alt.Scale(type="log", nice=False)
    y = alt.Y("value:Q", title="Singular value", scale=scale, axis=alt.Axis(tickCount=4, format="~g"))
    x = alt.X("index:Q", title="Rank", axis=alt.Axis(grid=False, tickCount=6, format="d"), scale=alt.Scale(nice=False))
    ramp = alt.Scale(range="ramp", nice=False, interpolate="rgb")
    shade = alt.Color("layer:Q", title="layer", scale=ramp, legend=alt.Legend(titleOrient="left"))
    about = tooltips({"layer:Q": "layer", "index:Q": "rank"}, {"value:Q": "singular value"}, ".4g")
    line = chart(records).encode(x=x, y=y, detail="layer:Q", color=shade)
    drawn = [
        line.mark_line(strokeWidth=1.5, opacity=0.9),
        line.mark_point(filled=True, size=40, opacity=0).encode(tooltip=about),
    ]
    return specification(drawn, height=250)
