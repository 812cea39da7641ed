"""Classes of tokens: how much goes round attention, and into it, for each; dots with intervals, and by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import altair as alt

from preskip.report.explain.measures import DIMENSIONS
from preskip.report.plots.base import POINT, Record, Spec, chart, colour, specification, tooltips
from preskip.runs.explain_schema import ExplainedClass

SEPARATOR = " · "  # a row's key: heading, or heading and class
ROW = 24


def class_rows(classes: Sequence[ExplainedClass]) -> list[tuple[str, ExplainedClass | None]]:
    """The plot's rows from top to bottom: (key, class), with a heading (None) above each dimension's classes."""
    rows: list[tuple[str, ExplainedClass | None]] = []
    for dimension in dict.fromkeys(entry["dimension"] for entry in classes):
        title = DIMENSIONS.get(dimension, str(dimension).capitalize())
        rows.append((title, None))
        rows += [(f"{title}{SEPARATOR}{e['class']}", e) for e in classes if e["dimension"] == dimension]
    return rows


def class_records(classes: Sequence[ExplainedClass], measure: str) -> list[Record]:
    """One record per row of the plot: value and limits of a measure, None for headings and what was not measured."""
    records = []
    for key, entry in class_rows(classes):
        about = cast(Record, entry or {})
        found = about.get(measure) or {}
        limits = {name: found.get(name) for name in ("value", "low", "high")}
        shown = {name: about.get(name) for name in ("class", "tokens")}
        records.append({"row": key, "measure": measure, **shown, **limits})
    return records


def classes_plot(records: Sequence[Record], title: str, measures: Sequence[str]) -> Spec:
    """A dot with its interval per class, from 0, the classes under the heading of their dimension; coloured by which
    of all `measures` it is.
    """
    base = chart(records).encode(y=_rows(records), color=colour(measures, field="measure"))
    base = base.transform_filter("isValid(datum.value) || !isValid(datum.class)")
    about = tooltips({"class:N": "class"}, {"tokens:Q": "tokens"}, ",")
    about += tooltips({}, {"value:Q": title, "low:Q": "from", "high:Q": "to"}, ".4g")
    x = alt.X("low:Q", title=title, scale=alt.Scale(zero=True, nice=True), axis=alt.Axis(tickCount=5))
    layers = [
        base.mark_rule(strokeWidth=3, strokeCap="round", opacity=0.55).encode(x=x, x2="high:Q", tooltip=about),
        base.mark_point(size=80, **POINT).encode(x="value:Q", tooltip=about),
    ]
    return specification(layers, height=ROW * len(records))


def by_layer_records(classes: Sequence[ExplainedClass], layers: Sequence[int]) -> list[Record]:
    """One record per class and layer."""
    return [
        {"row": key, "class": entry["class"] if entry else None, "layer": layer, "value": value}
        for key, entry in class_rows(classes)
        for layer, value in (zip(layers, entry["by_layer"], strict=True) if entry else [(layers[0], None)])
    ]


def by_layer(records: Sequence[Record], title: str) -> Spec:
    """Class by layer as a heat map."""
    legend = alt.Legend(
        orient="top", direction="horizontal", gradientLength=150, gradientThickness=10, titleOrient="left"
    )
    about = tooltips({"class:N": "class", "layer:O": "layer"}, {"value:Q": title}, ".4g")
    axis = alt.Axis(labelAngle=0, labelOverlap="greedy", ticks=False, domain=False)
    scale = alt.Scale(range="heatmap", zero=True, interpolate="rgb")
    shade = alt.Color("value:Q", title=title, scale=scale, legend=legend)
    cells = (
        chart(records)
        .mark_rect()
        .encode(
            y=_rows(records),
            x=alt.X("layer:O", title="Layer", axis=axis, scale=alt.Scale(paddingInner=0)),
            color=alt.condition("isValid(datum.value)", shade, alt.value("transparent")),
            tooltip=about,
        )
    )
    return specification([cells], height=ROW * len({record["row"] for record in records}))


def _rows(records: Sequence[Record]) -> Any:
    start = f"indexof(datum.value, '{SEPARATOR}')"
    heading = f"{start} < 0"
    weight = alt.condition(heading, alt.value("bold"), alt.value("normal"))
    axis = alt.Axis(
        ticks=False,
        domain=False,
        labelLimit=190,
        labelFontWeight=weight,
        labelOverlap=False,
        labelExpr=f"{heading} ? datum.value : slice(datum.value, {start} + {len(SEPARATOR)})",
    )
    order = list(dict.fromkeys(record["row"] for record in records))
    return alt.Y("row:N", title=None, axis=axis, scale=alt.Scale(domain=order, padding=0.15))
