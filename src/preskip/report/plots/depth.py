"""The learned branch by layer: functional size, norms against their nulls, and what each layer's parts are worth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from preskip.report.plots.base import Record, Spec, arm_colour, arm_shape, once, specification, tooltips
from preskip.stats.trends import null_band

Rows = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
MEASURES = {
    "skip_to_attention": "‖skip output‖ / ‖attention output‖",
    "enrichment": "‖x̃ − x̂‖ / ‖x̂‖",
    "skip_norm": "‖W_skip‖ (Frobenius)",
    "down_norm": "‖W_down‖ (Frobenius)",
}
NULLS = {"noise": "noise gradients", "shuffled": "shuffled targets"}


def depth_records(depth: Rows, measure: str) -> list[Record]:
    """One record per arm, seed and layer; arms for which the measure is absent or 0 in every layer are left out.

    `low` and `high` are the interval stored with the measure (as <measure>_low and <measure>_high), or None.
    """
    records: list[Record] = []
    for arm, seeds in depth.items():
        rows: list[Record] = [
            {
                "arm": arm,
                "seed": str(seed),
                "layer": layer["layer"],
                "value": layer[measure],
                "low": layer.get(f"{measure}_low"),
                "high": layer.get(f"{measure}_high"),
            }
            for seed, layers in seeds.items()
            for layer in layers
            if layer.get(measure) is not None
        ]
        if any(row["value"] for row in rows):
            records.extend(rows)
    return records


def depth(records: Sequence[Record], arms: Sequence[str], measure: str) -> Spec:
    """One measure by layer for several arms, one line per seed, the interval as a band, the axis from 0."""
    import altair as alt

    shown = {record["arm"] for record in records}
    legend = alt.Legend(values=[arm for arm in arms if arm in shown], symbolType="circle", symbolSize=90)
    base = alt.Chart(alt.InlineData(values=list(records))).encode(
        x=_layers(), detail="seed:N", color=arm_colour(arms, legend)
    )
    y = alt.Y("value:Q", title=MEASURES[measure], scale=alt.Scale(zero=True, nice=True))
    layers = []
    if any(record["low"] is not None for record in records):
        layers.append(base.mark_area(opacity=0.16).encode(y=alt.Y("low:Q"), y2="high:Q"))
    layers.append(base.mark_line(strokeWidth=1.75).encode(y=y, tooltip=_about(MEASURES[measure])))
    layers.append(base.mark_point(filled=True, size=30, opacity=1).encode(y=y, shape=arm_shape(arms, legend)))
    return specification(alt.layer(*layers), height=250)


def norm_records(results: Mapping[str, Any], arm: str, measure: str) -> list[Record]:
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


def norms(records: Sequence[Record], arms: Sequence[str], measure: str, top: float) -> Spec:
    """One arm's norm by layer on the bands of its nulls; the axis goes from 0 to `top`."""
    import altair as alt

    source = alt.Chart(alt.InlineData(values=list(records)))
    scale = alt.Scale(domain=[0, top], nice=False)
    y = alt.Y("value:Q", title=MEASURES[measure], scale=scale)
    learned = source.transform_filter("datum.part === 'arm'").encode(
        x=_layers(), y=y, color=arm_colour(arms), detail="seed:N"
    )
    layers = []
    nulls = [label for label in NULLS.values() if any(record.get("null") == label for record in records)]
    if nulls:
        shades = alt.Scale(domain=list(NULLS.values()), range=["#858c96", "#c99700"])
        legend = alt.Legend(values=nulls, symbolType="square", symbolOpacity=0.6, symbolStrokeWidth=0)
        fill = alt.Fill("null:N", title=None, scale=shades, legend=legend)
        band = source.transform_filter("datum.part === 'null'").encode(x=_layers(), fill=fill)
        outline = alt.Stroke("null:N", title=None, scale=shades, legend=legend)
        layers.append(
            # One null seed is a line, not a band: the stroke keeps it visible.
            band.mark_area(opacity=0.4).encode(
                y=alt.Y("low:Q", scale=scale), y2="high:Q", stroke=outline, strokeWidth=alt.value(1.5)
            )
        )
    layers += [
        learned.mark_line(strokeWidth=1.75).encode(tooltip=_about(MEASURES[measure])),
        learned.mark_point(filled=True, size=26, opacity=1).encode(shape=arm_shape(arms)),
    ]
    return specification(alt.layer(*layers), height=220)


def ablation_records(ablation: Mapping[str, Sequence[Mapping[str, Any]]], arm: str, part: str) -> list[Record]:
    """What switching one layer's part off costs, per seed and layer; seeds stand side by side (`place`)."""
    seeds = list(ablation)
    return [
        {
            "arm": arm,
            "seed": str(seed),
            "layer": row["layer"],
            "place": row["layer"] + 0.5 * (index - (len(seeds) - 1) / 2) / len(seeds),
            "difference": row["difference"],
            "low": row["low"],
            "high": row["high"],
        }
        for index, seed in enumerate(seeds)
        for row in ablation[seed]
        if row["part"] == part
    ]


def ablation(records: Sequence[Record], arms: Sequence[str]) -> Spec:
    """One arm's ablation by layer: points with their intervals over documents, above 0 where the part helps."""
    import altair as alt

    source = alt.Chart(alt.InlineData(values=list(records)))
    x = alt.X(
        "place:Q",
        title="Layer switched off",
        axis=alt.Axis(grid=False, tickMinStep=1, format="d"),
        scale=alt.Scale(nice=False, padding=8),
    )
    base = source.encode(x=x, color=arm_colour(arms))
    about = tooltips({"layer:Q": "layer", "seed:N": "seed"})
    about += tooltips({"difference:Q": "loss when off", "low:Q": "low", "high:Q": "high"}, "+.5f")
    y = alt.Y("difference:Q", title="Δ bits per byte when off", scale=alt.Scale(zero=True, nice=True))
    layers = [
        once(source).mark_rule(strokeWidth=1.25, strokeDash=[4, 3]).encode(y=alt.datum(0)),
        base.mark_rule(strokeWidth=1.5, opacity=0.6).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_point(filled=True, size=26, opacity=1).encode(y=y, shape=arm_shape(arms), tooltip=about),
    ]
    return specification(alt.layer(*layers), height=210)


def top_of(records: Iterable[Record]) -> float:
    """The top of an axis from 0 that holds all records, with a twentieth to spare."""
    values = [record[key] for record in records for key in ("value", "high") if record.get(key) is not None]
    return 1.05 * max(values, default=1.0) or 1.0


def _layers() -> Any:
    import altair as alt

    return alt.X(
        "layer:Q", title="Layer", axis=alt.Axis(grid=False, tickMinStep=1, format="d"), scale=alt.Scale(nice=False)
    )


def _about(title: str) -> list[Any]:
    return [
        *tooltips({"arm:N": "arm", "seed:N": "seed", "layer:Q": "layer"}),
        *tooltips({"value:Q": title}, ".4g"),
    ]
