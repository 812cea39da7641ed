"""Forest plots: the paired differences of one set and metric, their intervals, and the margin of equivalence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preskip.metrics import metric_named
from preskip.report.lookup import is_declared, ordered
from preskip.report.plots.base import Record, Spec, once, specification, tooltips
from preskip.report.verdicts import MINUS, p_text

OUTCOMES = ["better", "worse", "equivalent", "undecided"]
MARKS = ["circle", "triangle-down", "square", "diamond"]
MOST_PAIRS = 14


def forest_records(entries: Sequence[Mapping[str, Any]], described: Mapping[str, Any] | None = None) -> list[Record]:
    """One record per comparison of one set and metric, in shown units (accuracy in points), in the order drawn.

    Where there are more than 14 pairs, only those declared before training and those against `none` are drawn.

    Args:
        entries: of one set and metric.
        described: the set, as in results.json.
    """
    about = metric_named(entries[0]["metric"], described)
    if len(entries) > MOST_PAIRS:
        entries = [entry for entry in entries if is_declared(entry) or entry["reference"] == "none"]
    return [
        {
            "pair": f"{entry['arm']} {MINUS} {entry['reference']}",
            "difference": about.factor * entry["difference"],
            "low": about.factor * entry["low"],
            "high": about.factor * entry["high"],
            "outcome": entry["verdict"],
            "p": p_text(entry["p_holm"] if entry.get("p_holm") is not None else entry.get("p_value")),
            "margin_low": -margin if margin else None,
            "margin": margin,
        }
        for entry in ordered(entries, about.lower_is_better)
        for margin in [about.factor * entry["margin"] if entry.get("margin") is not None else None]
    ]


def forest(records: Sequence[Record], metric: str) -> Spec:
    """Paired differences of one metric with their intervals around a line at 0, on the band of equivalence."""
    import altair as alt

    about = metric_named(metric)
    # Short, for a phone: the page's heading says which direction is better.
    title = f"Difference, {about.difference_unit.strip() or about.name.lower()}"
    tooltip = tooltips({"pair:N": "comparison", "outcome:N": "verdict", "p:N": "p"})
    tooltip[1:1] = tooltips({"difference:Q": "difference", "low:Q": "low", "high:Q": "high"}, "+.4f")
    colour = alt.Color("outcome:N", scale=alt.Scale(domain=OUTCOMES, range="ordinal"), legend=None)
    source = alt.Chart(alt.InlineData(values=list(records)))
    axis = alt.Axis(ticks=False, domain=False, labelLimit=210, labelPadding=8)
    base = source.encode(y=alt.Y("pair:N", sort=None, title=None, axis=axis))
    layers = []
    if any(record["margin"] is not None for record in records):
        band = source.transform_aggregate(from_="min(margin_low)", to="max(margin)")
        layers.append(band.mark_rect(opacity=0.18, color="#808690").encode(x="from_:Q", x2="to:Q"))
    layers.append(once(source).mark_rule(strokeWidth=1.5, strokeDash=[4, 3]).encode(x=alt.datum(0)))
    layers.append(
        base.mark_rule(strokeWidth=3, strokeCap="round").encode(
            x=alt.X("low:Q", title=title, axis=alt.Axis(tickCount=5), scale=alt.Scale(nice=True, zero=True)),
            x2="high:Q",
            color=colour,
            tooltip=tooltip,
        )
    )
    layers.append(
        base.mark_point(filled=True, size=95, opacity=1).encode(
            x="difference:Q",
            color=colour,
            shape=alt.Shape("outcome:N", scale=alt.Scale(domain=OUTCOMES, range=MARKS), legend=None),
            tooltip=tooltip,
        )
    )
    return specification(alt.layer(*layers), height=26 * len(records) + 16)
