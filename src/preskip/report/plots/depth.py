"""The learned branch by layer: functional size, norms against their nulls, and what each layer's parts are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import altair as alt

from preskip.report.plots.base import (
    POINT,
    Record,
    Spec,
    chart,
    colour,
    layer_axis,
    shape,
    shown_arms,
    specification,
    tooltips,
    value_axis,
    zero_line,
)
from preskip.runs.schema import AblationRow, BySeed, Results
from preskip.stats.trends import null_band

MEASURES = {
    "skip_to_attention": "‖skip output‖ / ‖attention output‖",
    "enrichment": "‖x̃ − x̂‖ / ‖x̂‖",
    "skip_norm": "‖W_skip‖ (Frobenius)",
    "down_norm": "‖W_down‖ (Frobenius)",
}
NULLS = {"noise": "noise gradients", "shuffled": "shuffled targets"}
SHADES = alt.Scale(domain=list(NULLS.values()), range=["#858c96", "#c99700"])


def depth_records(depth: Mapping[str, BySeed], measure: str) -> list[Record]:
    """One record per arm, seed and layer; arms for which the measure is absent or 0 in every layer are left out.

    `low` and `high` are the interval stored with the measure (as <measure>_low and <measure>_high), or None.
    """
    records: list[Record] = []
    for arm, seeds in depth.items():
        rows: list[Record] = [
            {
                "arm": arm,
                "seed": str(seed),
                "layer": row["layer"],
                "value": row[measure],
                **{limit: row.get(f"{measure}_{limit}") for limit in ("low", "high")},
            }
            for seed, layers in seeds.items()
            for row in cast(Sequence[Record], layers)
            if row.get(measure) is not None
        ]
        records += rows if any(row["value"] for row in rows) else []
    return records


def depth(records: Sequence[Record], arms: Sequence[str], measure: str) -> Spec:
    """One measure by layer for several arms as `_over_seeds` draws them, the axis from 0."""
    legend = shown_arms(arms, records, 90)
    y = value_axis("mean", MEASURES[measure])
    return specification(_over_seeds(chart(records), records, y, arms, measure, legend), height=250)


def norm_records(results: Results, arm: str, measure: str) -> list[Record]:
    """The norm of one arm's weight by layer: part "arm" per seed, part "null" as the band of each null that it has
    (`preskip.stats.trends.null_band`).
    """
    records: list[Record] = [
        {"part": "arm", **{key: row[key] for key in ("arm", "seed", "layer", "value")}}
        for row in depth_records({arm: results["depth"][arm]}, measure)
    ]
    for null, label in NULLS.items():
        runs = ((results.get("nulls") or {}).get(null) or {}).get(arm) or ()
        # Layers of one shape are exchangeable under noise; what can be learned without order differs by layer.
        records += [{"part": "null", "null": label, **row} for row in null_band(runs, measure, pooled=null == "noise")]
    return records


def norms(records: Sequence[Record], arms: Sequence[str], measure: str) -> Spec:
    """One arm's norm by layer on the bands of its nulls, from 0 to a twentieth above all of them."""
    source = chart(records)
    values = [record[key] for record in records for key in ("value", "high") if record.get(key) is not None]
    limits = {"domain": [0, 1.05 * max(values, default=1.0) or 1.0], "nice": False, "zero": alt.Undefined}
    y = value_axis("mean", MEASURES[measure], **limits)
    learned = [record for record in records if record["part"] == "arm"]
    layers = _over_seeds(source.transform_filter("datum.part === 'arm'"), learned, y, arms, measure)
    nulls = [label for label in NULLS.values() if any(record.get("null") == label for record in records)]
    if nulls:
        legend = alt.Legend(values=nulls, symbolType="square", symbolOpacity=0.6, symbolStrokeWidth=0)
        # One null seed is a line, not a band: the stroke keeps it visible.
        band = source.transform_filter("datum.part === 'null'").mark_area(opacity=0.4, strokeWidth=1.5)
        shades = [kind("null:N", title=None, scale=SHADES, legend=legend) for kind in (alt.Fill, alt.Stroke)]
        low = value_axis("low", MEASURES[measure], **limits)
        layers.insert(0, band.encode(x=layer_axis(), y=low, y2="high:Q", fill=shades[0], stroke=shades[1]))
    return specification(layers, height=220)


def ablation_records(ablation: Mapping[str, Sequence[AblationRow]], arm: str, part: str) -> list[Record]:
    """What switching one layer's part off costs, per seed and layer; seeds stand side by side (`place`)."""
    places = {seed: 0.5 * (index - (len(ablation) - 1) / 2) / len(ablation) for index, seed in enumerate(ablation)}
    return [
        {
            "arm": arm,
            "seed": str(seed),
            "layer": row["layer"],
            "place": row["layer"] + places[seed],
            **{key: cast(Record, row)[key] for key in ("difference", "low", "high")},
        }
        for seed, rows in ablation.items()
        for row in rows
        if row["part"] == part
    ]


def ablation(records: Sequence[Record], arms: Sequence[str]) -> Spec:
    """One arm's ablation by layer: points with their intervals over documents, above 0 where the part helps."""
    source = chart(records)
    base = source.encode(x=layer_axis("place", "Layer switched off", padding=8), color=colour(arms))
    cost = {"difference:Q": "loss when off", "low:Q": "low", "high:Q": "high"}
    about = tooltips({"layer:Q": "layer", "seed:N": "seed"}, cost, "+.5f")
    y = value_axis("difference", "Δ bits per byte when off")
    layers = [
        zero_line(source),
        base.mark_rule(strokeWidth=1.5, opacity=0.6).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_point(size=26, **POINT).encode(y=y, shape=shape(arms), tooltip=about),
    ]
    return specification(layers, height=210)


def _over_seeds(
    source: Any, records: Sequence[Record], y: Any, arms: Sequence[str], measure: str, legend: Any = None
) -> list[Any]:
    """A line and marks for the mean over seeds, on a band from the lowest to the highest; of one seed the band is its
    stored interval, if it has one.
    """
    several = len({record["seed"] for record in records}) > 1
    limits = not several and any(record.get("low") is not None for record in records)
    low, high = ("min(low)", "max(high)") if limits else ("min(value)", "max(value)")
    mean = source.transform_aggregate(mean="mean(value)", bottom=low, top=high, groupby=["arm", "layer"])
    base = mean.encode(x=layer_axis(), color=colour(arms, legend))
    shown = {"mean:Q": MEASURES[measure], "bottom:Q": "lowest", "top:Q": "highest"}
    about = tooltips({"arm:N": "arm", "layer:Q": "layer"}, shown, ".4g")
    band = [base.mark_area(opacity=0.2).encode(y=alt.Y("bottom:Q"), y2="top:Q")] if several or limits else []
    return [
        *band,
        base.mark_line(strokeWidth=1.75).encode(y=y, tooltip=about),
        base.mark_point(size=26, **POINT).encode(y=y, shape=shape(arms, legend)),
    ]
