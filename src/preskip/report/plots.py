"""Plots of the report as Vega-Lite specifications: pure functions from records to dictionaries.

Colours are not in the specifications: they name the ranges "category" (arms) and "ordinal" (better, worse, undecided),
which the page fills from its style sheet, so the same plot serves the light and the dark page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preskip.report.verdicts import MINUS, metric_named, outcome

Record = dict[str, Any]
Spec = dict[str, Any]

OUTCOMES = ["better", "worse", "undecided"]
POINT_BUDGET = 12_000  # training points in the whole page: about 1 MB
POINTS_PER_CURVE = 600


def forest_records(comparisons: Sequence[Mapping[str, Any]], metric: str) -> list[Record]:
    """One record per comparison of one metric, in shown units (accuracy in points)."""
    factor = metric_named(metric).factor
    return [
        {
            "pair": f"{entry['arm']} {MINUS} {entry['reference']}",
            "difference": factor * entry["difference"],
            "low": factor * entry["low"],
            "high": factor * entry["high"],
            "outcome": outcome(entry),
        }
        for entry in comparisons
        if entry["metric"] == metric
    ]


def forest(records: Sequence[Record], metric: str) -> Spec:
    """Paired differences of one metric with their intervals around a line at 0."""
    import altair as alt

    about = metric_named(metric)
    # Short, for a phone: the page's heading says which direction is better.
    title = f"Difference, {about.difference_unit.strip() or about.name.lower()}"
    tooltip = [
        alt.Tooltip("pair:N", title="comparison"),
        alt.Tooltip("difference:Q", format="+.4f"),
        alt.Tooltip("low:Q", format="+.4f"),
        alt.Tooltip("high:Q", format="+.4f"),
        alt.Tooltip("outcome:N"),
    ]
    colour = alt.Color("outcome:N", scale=alt.Scale(domain=OUTCOMES, range="ordinal"), legend=None)
    source = alt.Chart(alt.InlineData(values=list(records)))
    base = source.encode(
        y=alt.Y(
            "pair:N", sort=None, title=None, axis=alt.Axis(ticks=False, domain=False, labelLimit=170, labelPadding=8)
        )
    )
    zero = source.mark_rule(strokeWidth=1.5, strokeDash=[4, 3], opacity=0.75).encode(x=alt.datum(0))
    bar = base.mark_rule(strokeWidth=3, strokeCap="round").encode(
        x=alt.X("low:Q", title=title, axis=alt.Axis(tickCount=5), scale=alt.Scale(nice=True, zero=True)),
        x2="high:Q",
        color=colour,
        tooltip=tooltip,
    )
    point = base.mark_point(filled=True, size=110, opacity=1).encode(
        x="difference:Q",
        color=colour,
        shape=alt.Shape(
            "outcome:N", scale=alt.Scale(domain=OUTCOMES, range=["circle", "triangle-down", "diamond"]), legend=None
        ),
        tooltip=tooltip,
    )
    return _spec(alt.layer(zero, bar, point), height=44 * len(records) + 16)


def training_records(curves: Sequence[tuple[str, str, Sequence[Mapping[str, Any]]]]) -> list[Record]:
    """Loss per step, raw and smoothed, thinned to the page's budget by means over equal runs of steps.

    Args:
        curves: (arm, seed, lines of train.jsonl) per trained arm and seed.
    """
    limit = max(20, min(POINTS_PER_CURVE, POINT_BUDGET // max(1, len(curves))))
    records: list[Record] = []
    for arm, seed, lines in curves:
        smooth = smoothed([line.get("loss") for line in lines])
        width = -(-len(lines) // limit) if lines else 1
        for start in range(0, len(lines), width):
            window = range(start, min(start + width, len(lines)))
            losses = [lines[i]["loss"] for i in window if lines[i].get("loss") is not None]
            last = smooth[window[-1]]
            records.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "step": lines[window[-1]]["step"],
                    "loss": round(sum(losses) / len(losses), 5) if losses else None,
                    "smoothed": None if last is None else round(last, 5),
                }
            )
    return records


def smoothed(losses: Sequence[float | None]) -> list[float | None]:
    """Exponential moving average over about a twentieth of the run (at least 5 steps), without bias at the start."""
    keep = 1 - 1 / max(5, len(losses) / 20)
    total = weight = 0.0
    result: list[float | None] = []
    for loss in losses:
        if loss is not None:
            total, weight = keep * total + (1 - keep) * loss, keep * weight + (1 - keep)
        result.append(total / weight if weight else None)
    return result


def training(records: Sequence[Record], arms: Sequence[str]) -> Spec:
    """Training loss by step: thin raw lines, strong smoothed ones, one colour and dash per arm, one line per seed."""
    import altair as alt

    base = alt.Chart(alt.InlineData(values=list(records))).encode(
        x=alt.X("step:Q", title="Optimiser step", axis=alt.Axis(grid=False, tickCount=6, format="d")),
        color=alt.Color("arm:N", scale=alt.Scale(domain=list(arms)), title=None, legend=alt.Legend(symbolOpacity=1)),
        detail="seed:N",
    )
    scale = alt.Scale(zero=False, nice=True)
    raw = base.mark_line(strokeWidth=1, opacity=0.35, clip=True).encode(
        y=alt.Y("loss:Q", title="Loss, nats per token", scale=scale)
    )
    smooth = base.mark_line(strokeWidth=2.25).encode(
        y=alt.Y("smoothed:Q", title="Loss, nats per token", scale=scale),
        strokeDash=alt.StrokeDash(
            "arm:N", scale=alt.Scale(domain=list(arms)), title=None, legend=alt.Legend(symbolOpacity=1)
        ),
        tooltip=[
            alt.Tooltip("arm:N"),
            alt.Tooltip("seed:N"),
            alt.Tooltip("step:Q"),
            alt.Tooltip("loss:Q", format=".4f"),
            alt.Tooltip("smoothed:Q", format=".4f"),
        ],
    )
    return _spec(alt.layer(raw, smooth), height=300)


DEPTH_MEASURES = {
    "skip_to_attention": "‖skip output‖ / ‖attention output‖",
    "enrichment": "‖x̃ − x̂‖ / ‖x̂‖",
    "skip_norm": "‖W_skip‖ (Frobenius)",
}


def depth_records(depth: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], measure: str) -> list[Record]:
    """One record per arm, seed and layer; arms for which the measure is absent or 0 in every layer are left out."""
    records: list[Record] = []
    for arm, seeds in depth.items():
        rows: list[Record] = [
            {"arm": arm, "seed": str(seed), "layer": layer["layer"], "value": layer[measure]}
            for seed, layers in seeds.items()
            for layer in layers
            if layer.get(measure) is not None
        ]
        if any(row["value"] for row in rows):
            records.extend(rows)
    return records


def depth(records: Sequence[Record], arms: Sequence[str], measure: str) -> Spec:
    """One measure of the learned branch by layer: one colour and dash per arm, one line per seed, the axis from 0."""
    import altair as alt

    shown = {record["arm"] for record in records}
    legend = alt.Legend(values=[arm for arm in arms if arm in shown])
    scale = alt.Scale(domain=list(arms))
    chart = (
        alt.Chart(alt.InlineData(values=list(records)))
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=28, filled=True))
        .encode(
            x=alt.X(
                "layer:Q",
                title="Layer",
                axis=alt.Axis(grid=False, tickMinStep=1, format="d"),
                scale=alt.Scale(nice=False),
            ),
            y=alt.Y("value:Q", title=DEPTH_MEASURES[measure], scale=alt.Scale(zero=True, nice=True)),
            color=alt.Color("arm:N", scale=scale, title=None, legend=legend),
            strokeDash=alt.StrokeDash("arm:N", scale=scale, title=None, legend=legend),
            detail="seed:N",
            tooltip=[
                alt.Tooltip("arm:N"),
                alt.Tooltip("seed:N"),
                alt.Tooltip("layer:Q"),
                alt.Tooltip("value:Q", title=DEPTH_MEASURES[measure], format=".4g"),
            ],
        )
    )
    return _spec(chart, height=240)


def _spec(chart: Any, *, height: int) -> Spec:
    import altair as alt

    with alt.data_transformers.enable("default", consolidate_datasets=False, max_rows=None):
        spec: Spec = chart.properties(width="container", height=height).to_dict()
    spec.pop("$schema", None)  # an address, though nothing would load it
    spec.pop("config", None)  # the page's own
    return spec
