"""Forest plots: the paired differences of one set and metric, their intervals, and the margin of equivalence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import altair as alt

from preskip.metrics import Metric
from preskip.report.lookup import is_declared, ordered, p_value, with_plain
from preskip.report.plots.base import POINT, Record, Spec, chart, specification, tooltips, zero_line
from preskip.report.words.verdicts import MINUS, p_text
from preskip.runs.schema import Comparison

OUTCOMES = ["better", "worse", "equivalent", "undecided", "too few units"]
MARKS = ["circle", "triangle-down", "square", "diamond", "diamond"]
MOST_PAIRS = 14


def forest_records(entries: Sequence[Comparison], about: Metric, plain: str) -> list[Record]:
    """One record per comparison of one set and metric, in shown units (accuracy in points), in the order drawn.

    Where there are more than 14 pairs, only those declared before training and those with the arm `plain` are drawn.
    """
    if len(entries) > MOST_PAIRS:
        entries = [entry for entry in entries if is_declared(entry) or with_plain(entry, plain)]
    return [_record(entry, about) for entry in ordered(entries, about.lower_is_better, plain)]


def _record(entry: Comparison, about: Metric) -> Record:
    stated, detail = entry.get("margin"), entry.get("detail")
    margin = None if stated is None else about.factor * stated
    by_seed = detail["by_seed"] if detail and entry["seeds"] > 1 else []
    return {
        "pair": f"{entry['arm']} {MINUS} {entry['reference']}",
        **{key: about.factor * cast(Any, entry)[key] for key in ("difference", "low", "high")},
        "outcome": entry["verdict"],
        "declared": is_declared(entry),
        "p": f"{p_text(p_value(entry))} ({'corrected' if is_declared(entry) else 'not corrected'})",
        "seeds": [about.factor * value for value in by_seed],
        "margin_low": -margin if margin else None,
        "margin": margin,
    }


def forest(records: Sequence[Record], about: Metric) -> Spec:
    """Paired differences of one metric with their intervals around a line at 0, on the band of equivalence; marks of
    declared ones are filled, of exploratory ones hollow, and each seed's difference is a small tick.
    """
    # Short, for a phone: the page's heading says which direction is better.
    title = f"Difference, {about.difference_unit.strip() or about.name.lower()}"
    x = alt.X("low:Q", title=title, axis=alt.Axis(tickCount=5), scale=alt.Scale(nice=True, zero=True))
    limits = {"difference:Q": "difference", "low:Q": "low", "high:Q": "high"}
    tooltip = tooltips({"pair:N": "comparison"}, limits, "+.4f") + tooltips({"outcome:N": "verdict", "p:N": "p"})
    shade = alt.Color("outcome:N", scale=alt.Scale(domain=OUTCOMES, range="ordinal"), legend=None)
    mark = alt.Shape("outcome:N", scale=alt.Scale(domain=OUTCOMES, range=MARKS), legend=None)
    source = chart(records)
    axis = alt.Axis(ticks=False, domain=False, labelLimit=210, labelPadding=8)
    base = source.encode(y=alt.Y("pair:N", sort=None, title=None, axis=axis), color=shade, tooltip=tooltip)
    layers = [
        zero_line(source, "x"),
        base.mark_rule(strokeWidth=3, strokeCap="round").encode(x=x, x2="high:Q"),
    ]
    marks = {
        True: base.transform_filter("datum.declared").mark_point(size=95, **POINT),
        False: base.transform_filter("!datum.declared").mark_point(size=80, strokeWidth=2, opacity=1, style="hollow"),
    }
    if any(record["seeds"] for record in records):
        ticks = base.transform_flatten(["seeds"]).mark_tick(thickness=1.5, size=11, opacity=0.8)
        layers.append(ticks.encode(x="seeds:Q"))
    kinds = {bool(record["declared"]) for record in records}
    layers += [points.encode(x="difference:Q", shape=mark) for kind, points in marks.items() if kind in kinds]
    if any(record["margin"] is not None for record in records):
        band = source.transform_aggregate(from_="min(margin_low)", to="max(margin)")
        layers.insert(0, band.mark_rect(opacity=0.18, color="#808690").encode(x="from_:Q", x2="to:Q"))
    return specification(layers, height=26 * len(records) + 16)
